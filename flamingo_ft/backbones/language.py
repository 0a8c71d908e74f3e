"""Language models: a causal LM of transformers and its tokenizer, from the package, a folder or the Hub.

Whatever the place, the files end up in one folder and are loaded from there, so a model loads the same way
online, offline and from the package, and its content hash is that of the files that were read.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from flamingo_ft.backbones.device import default_device
from flamingo_ft.backbones.identity import files_sha256, has_vocabulary
from flamingo_ft.backbones.license import CARD, license_in
from flamingo_ft.backbones.mosaic_gpt import register_mosaic_gpt
from flamingo_ft.backbones.quantization import Quantization, settle
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.hub.fetch import download
from flamingo_ft.hub.names import NANO, commit_of, local_language, missing_path_message
from flamingo_ft.machine_errors import is_machine_error, reraise_machine_error

NANO_FOLDER = Path(__file__).parent / "nano" / "language"

# "name" or "org/name": anything else cannot be a Hub repository.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# What loading needs of a repository: not its subfolders, nor the weights once more in their authors' format.
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", CARD]
NOT_NEEDED = ["*/*", "consolidated*"]

# What transformers, torch and safetensors raise for files that are missing, broken or of another kind.
UNLOADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    ImportError,
    RuntimeError,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)

register_mosaic_gpt()

# Encoders: causal only where their configuration says that they were trained as a decoder.
ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}


@dataclass(frozen=True)
class LanguageBackbone:
    """A causal language model, the tokenizer that goes with it, and what it can be recognised by.

    source: {"name", "revision", "sha256", "quantization"}: what was asked for (a folder by its absolute path), its Hub
    commit (None for a folder), the digest of configuration, weights and tokenizer, and how its matrices are kept (None: as
    they were stored).
    license: as its model card states it, None where it does not.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: dict
    license: str | None = None


def load_language(
    name: str,
    revision: str | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
    *,
    tokenizer: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    device: torch.device | str | None = None,
) -> LanguageBackbone:
    """Load a causal language model, frozen and in eval mode.

    name: "nano", a folder, or a Hub repository.
    revision: of a Hub repository, a commit, branch or tag; the commit it resolves to is recorded.
    dtype: of the parameters; "auto" is the checkpoint's own; None is that with a GPU and float32 without one, or with
        quantization its compute dtype.
    tokenizer: its own "nano", folder or Hub repository, where it does not come with the model and the model's
        configuration does not name it.
    local_files_only: take nothing from the Hub that is not in the cache.
    trust_remote_code: run code that comes with the model, for architectures that transformers does not have.
    quantization: how its matrices are kept, all but the output head's.
    device: where it goes; None leaves it on the CPU, or with quantization puts it on the GPU where there is one.

    A model that was quantized before it was saved loads as it is. Raises UserError when there is no such model, when
    it cannot be reached or read, is no causal LM, or is already quantized and was to be quantized.
    """
    folder = language_folder(name, revision, local_files_only)
    is_local = local_language(name, revision) is not None
    config = _causal_config(folder, name, trust_remote_code)
    _refuse_twice_quantized(config, name, quantization)
    code = {"trust_remote_code": trust_remote_code}
    placed = _placed(dtype, quantization, device)
    model, report = _load(
        AutoModelForCausalLM, folder, name, config=config, output_loading_info=True, **placed, **code
    )
    _refuse_encoder(model.config, name)
    _refuse_missing(report["missing_keys"], name)
    settle(model)
    tokenizer = tokenizer or _tokenizer_elsewhere(folder, config) or name
    words = folder if tokenizer == name else language_folder(tokenizer, None, local_files_only, weights=False)
    return LanguageBackbone(
        model=model.eval().requires_grad_(False),
        tokenizer=_load(AutoTokenizer, words, tokenizer, **code),
        source={
            "name": str(folder.absolute()) if is_local else name,
            "revision": None if is_local else commit_of(folder),
            "sha256": files_sha256(folder),
            "quantization": quantization.record() if quantization else None,
        },
        license=license_in(folder.parent if name == "nano" else folder),
    )


def _placed(
    dtype: torch.dtype | Literal["auto"] | None,
    quantization: Quantization | None,
    device: torch.device | str | None,
) -> dict[str, Any]:
    """What `from_pretrained` is told of format, dtype and device. It streams: a shard at a time is in memory."""
    if quantization is not None:
        placed = {
            "quantization_config": quantization.bnb_config(),
            "device_map": {"": device or default_device()},
        }
        return {"dtype": dtype or quantization.dtype, **placed}
    placed = {} if device is None else {"device_map": {"": device}}
    return {"dtype": dtype or ("auto" if torch.cuda.is_available() else torch.float32), **placed}


def language_files(
    name: str, revision: str | None = None, local_files_only: bool = False
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of a language model, which say all of it but its weights; only they are fetched.

    local_files_only: take nothing from the Hub that is not in the cache; UserError where something is missing.
    """
    folder = language_folder(name, revision, local_files_only, weights=False)
    config = _causal_config(folder, name, trust_remote_code=False)
    elsewhere = _tokenizer_elsewhere(folder, config)
    words = language_folder(elsewhere, None, local_files_only, weights=False) if elsewhere else folder
    return config, _load(AutoTokenizer, words, elsewhere or name)


def _tokenizer_elsewhere(folder: Path, config: PreTrainedConfig) -> str | None:
    """The tokenizer's own name, where it does not come with the model and its configuration says (MosaicML's do)."""
    return None if has_vocabulary(folder) else getattr(config, "tokenizer_name", None)


def language_folder(
    name: str, revision: str | None, local_files_only: bool = False, weights: bool = True
) -> Path:
    """The folder that holds the files of `name`, after fetching what is missing."""
    folder = NANO_FOLDER if name == NANO else local_language(name, revision)
    if folder is not None and folder.is_dir():
        if revision is not None:
            raise UserError(f"revision {revision} was asked of {name}, which is no Hub repository; remove it")
        return folder
    if name == NANO:
        raise UserError(f"the nano language model is missing from {folder}; install the package again")
    if folder is not None:
        raise UserError(f"language model: {missing_path_message(name, on_hub=f'{name} with revision main')}")
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"language model {name!r}: neither a folder nor a name on the Hub; check the name")
    asked = f"language model {name}" + (f" (revision {revision})" if revision else "")
    formats = ["*.safetensors", "*.bin"] if weights else ["*.json"]
    for form in formats:
        folder = download(
            asked, name, revision, [*SMALL_FILES, form], NOT_NEEDED, local_files_only=local_files_only
        )
        if any(folder.glob(form)):
            break
    return folder


def _causal_config(folder: Path, name: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration in `folder`, refused where no causal LM can be made of it."""
    if not (folder / "config.json").is_file():
        raise UserError(f"language model {name} has no config.json in {folder}; give a transformers model")
    config = _load(AutoConfig, folder, name, trust_remote_code=trust_remote_code)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise UserError(
            f"language model {name} is of type {config.model_type!r}, which is no causal language model; "
            "choose a decoder-only one (Llama, Qwen, GPT, OPT, ...)"
        )
    return config


def _refuse_twice_quantized(config: PreTrainedConfig, name: str, wanted: Quantization | None) -> None:
    found = getattr(config, "quantization_config", None)
    if found is not None and wanted is not None:
        method = dict(found).get("quant_method", "an unknown method")
        raise UserError(
            f"language model {name} was to be kept in {wanted.format}, but is already quantized ({method}); "
            "set quantization to none, or give the unquantized model"
        )


def _refuse_encoder(config: PreTrainedConfig, name: str) -> None:
    if config.model_type in ENCODERS and not getattr(config, "is_decoder", True):
        raise UserError(
            f"language model {name} is a {config.model_type} encoder, whose tokens see the ones after them; "
            "choose a decoder-only model, or set is_decoder in its config.json if it was trained as one"
        )


def _refuse_missing(keys: Iterable[str], name: str) -> None:
    """A frozen model must not hold weights that no file gave: transformers makes them up and only warns."""
    missing = sorted(keys)
    if missing:
        raise UserError(
            f"the files of language model {name} lack {len(missing)} of its tensors ({missing[0]}, ...); "
            "give one that was saved with its language-modelling head, whole"
        )


def _load(auto_class: type, folder: Path, name: str, **options: object) -> object:
    """`auto_class.from_pretrained` on `folder`, offline; its failures become one line, those of the machine stay."""
    try:
        with _conversion_errors():
            return auto_class.from_pretrained(folder, local_files_only=True, **options)
    except UNLOADABLE as error:
        reraise_machine_error(error)
        remedy = "check that its files are there, whole, and not newer than the installed transformers"
        if "trust_remote_code" in str(error):
            remedy = "it comes with code of its own: pass trust_remote_code=True if you trust that"
        problem = f"language model {name} does not load ({auto_class.__name__}): {error_message(error)}"
        raise UserError(f"{problem}; {remedy}") from error


@contextmanager
def _conversion_errors() -> Iterator[None]:
    """Raise the machine's error that stopped transformers from converting or quantizing a weight.

    transformers catches any exception there, logs its traceback as a warning, and raises a RuntimeError without it.
    """
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_utils")
    level, propagate = logger.level, logger.propagate
    if not logger.isEnabledFor(logging.WARNING):  # a trainer silenced it; it is read here, and stays silent
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    except RuntimeError as error:
        lines = (RuntimeError(line.strip()) for text in logged for line in text.splitlines())
        raise next(filter(is_machine_error, lines), error) from None
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
