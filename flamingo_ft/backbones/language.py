"""Load a causal language model of transformers and its tokenizer from the package, a folder or the Hub.

Wherever they come from, the files end up in one folder and are loaded from there, so that a model loads the
same way online, offline and from the package, and its content hash is that of the files that were read.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flamingo_ft.backbones.compat import weight_conversion_errors
from flamingo_ft.backbones.freed_memory import freed_memory_returned
from flamingo_ft.backbones.mosaic_gpt import register_mosaic_gpt
from flamingo_ft.backbones.provenance import MODEL_CARD, files_sha256, has_vocabulary, license_in
from flamingo_ft.backbones.quantization import Quantization, normalize_bnb_layers
from flamingo_ft.backbones.text_part import KEY_MAPPING, record_tying, text_part
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.hub.fetch import download
from flamingo_ft.hub.names import NANO, commit_of, local_language, missing_path_message
from flamingo_ft.hub.weight_files import CONFIG_FILE
from flamingo_ft.machine_errors import reraise_machine_error
from flamingo_ft.processes import default_device

NANO_FOLDER = Path(__file__).parent / "nano" / "language"

# "name" or "org/name": nothing else can be a Hub repository.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# What loading needs of a repository: no subfolders, and no second copy of the weights in another format.
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", MODEL_CARD]
NOT_NEEDED = ["*/*", "consolidated*"]

# Raised by transformers, torch and safetensors for files that are missing, damaged or of another kind.
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


@dataclass(frozen=True)
class LanguageBackbone:
    """A causal language model, its tokenizer, and what identifies it.

    source: {"name", "revision", "sha256", "quantization"}: the name that was asked for (absolute for a
        folder), its Hub commit (None for a folder), the hash of configuration, weights and tokenizer, and the
        format of its matrices (None: as stored).
    license: as stated on its model card; None if it is not.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: dict
    license: str | None = None


@freed_memory_returned()
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
    """Load a causal language model, frozen and in eval mode; of a vision-language model, its language model.

    name: "nano", a folder, or a Hub repository.
    revision: commit, branch or tag of a Hub repository; the commit it resolves to is recorded.
    dtype: of the parameters; "auto" is the checkpoint's own. None is the compute dtype with quantization,
        else the checkpoint's own with a GPU and float32 without one.
    tokenizer: "nano", a folder or a Hub repository, if the model neither brings one nor names one.
    local_files_only: use only files that are on this machine.
    trust_remote_code: run code that comes with the model, for architectures that transformers does not have.
    quantization: format of all its matrices except the output head.
    device: None is the CPU or, with quantization, the GPU if there is one.

    A model that was saved quantized loads as it is. Raises UserError if there is no such model, if it cannot
    be downloaded or read, if it is not a causal LM, and for quantization of an already quantized model.
    """
    folder = language_folder(name, revision, local_files_only)
    is_local = local_language(name, revision) is not None
    whole = _read_config(folder, name, trust_remote_code)
    config = _causal_config(whole, name)
    _check_not_yet_quantized(config, name, quantization)
    model, info = _from_pretrained(
        AutoModelForCausalLM,
        folder,
        name,
        config=config,
        key_mapping=None if config is whole else KEY_MAPPING,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
        **_dtype_and_device(dtype, quantization, device),
    )
    _check_not_an_encoder(model.config, name)
    _check_complete(info["missing_keys"], name)
    if config is not whole:
        record_tying(model)
    normalize_bnb_layers(model)
    tokenizer = tokenizer or _named_tokenizer(folder, config) or name
    tokenizer_folder = folder
    if tokenizer != name:
        tokenizer_folder = language_folder(tokenizer, None, local_files_only, weights=False)
    return LanguageBackbone(
        model=model.eval().requires_grad_(False),
        tokenizer=_from_pretrained(
            AutoTokenizer, tokenizer_folder, tokenizer, trust_remote_code=trust_remote_code
        ),
        source={
            "name": str(folder.absolute()) if is_local else name,
            "revision": None if is_local else commit_of(folder),
            "sha256": files_sha256(folder),
            "quantization": quantization.record() if quantization else None,
        },
        license=license_in(folder.parent if name == NANO else folder),
    )


def language_files(
    name: str, revision: str | None = None, local_files_only: bool = False
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Load the configuration and tokenizer of a language model; its weights are not downloaded.

    local_files_only: use only files that are on this machine. Raises UserError as `load_language` does.
    """
    folder = language_folder(name, revision, local_files_only, weights=False)
    config = _causal_config(_read_config(folder, name, trust_remote_code=False), name)
    named_tokenizer = _named_tokenizer(folder, config)
    if named_tokenizer:
        folder = language_folder(named_tokenizer, None, local_files_only, weights=False)
    return config, _from_pretrained(AutoTokenizer, folder, named_tokenizer or name)


def language_folder(
    name: str, revision: str | None, local_files_only: bool = False, weights: bool = True
) -> Path:
    """Return the folder with the files of ``name``, after downloading what is missing.

    weights: False downloads only the small files. Raises UserError if there is no such model.
    """
    folder = NANO_FOLDER if name == NANO else local_language(name, revision)
    if folder is not None and folder.is_dir():
        if revision is not None:
            raise UserError(
                f"revision {revision} given for {name}, which is not on the Hub; remove the revision"
            )
        return folder
    if name == NANO:
        raise UserError(f"the nano language model is missing from {folder}; reinstall the package")
    if folder is not None:
        raise UserError(f"language model: {missing_path_message(name, on_hub=f'{name} with revision main')}")
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"language model {name!r}: neither a folder nor a name on the Hub; check the name")
    what = f"language model {name}" + (f" (revision {revision})" if revision else "")

    def fetch(*patterns: str) -> Path:
        allowed = [*SMALL_FILES, *patterns]
        return download(what, name, revision, allowed, NOT_NEEDED, local_files_only=local_files_only)

    if not weights:
        return fetch()
    folder = fetch("*.safetensors")
    return folder if any(folder.glob("*.safetensors")) else fetch("*.bin")


# --- Loading


def _dtype_and_device(
    dtype: torch.dtype | Literal["auto"] | None,
    quantization: Quantization | None,
    device: torch.device | str | None,
) -> dict[str, Any]:
    """Return the options of `from_pretrained`, which loads one shard at a time with any of them."""
    if quantization is not None:
        return {
            "dtype": dtype or quantization.dtype,
            "quantization_config": quantization.bnb_config(),
            "device_map": {"": device or default_device()},
        }
    options = {} if device is None else {"device_map": {"": device}}
    return {"dtype": dtype or ("auto" if torch.cuda.is_available() else torch.float32), **options}


def _from_pretrained(auto_class: Any, folder: Path, name: str, **options: Any) -> Any:
    """Load from ``folder`` without the network. Raises UserError in one line, or the machine's error."""
    try:
        with weight_conversion_errors():
            return auto_class.from_pretrained(folder, local_files_only=True, **options)
    except UNLOADABLE as error:
        reraise_machine_error(error)
        remedy = "check that its files are there, whole, and not newer than the installed transformers"
        if "trust_remote_code" in str(error):
            remedy = "it comes with code of its own: pass trust_remote_code=True if you trust that"
        problem = f"language model {name} does not load ({auto_class.__name__}): {error_message(error)}"
        raise UserError(f"{problem}; {remedy}") from error


def _read_config(folder: Path, name: str, trust_remote_code: bool) -> PreTrainedConfig:
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"language model {name} has no {CONFIG_FILE} in {folder}; give a transformers model")
    return _from_pretrained(AutoConfig, folder, name, trust_remote_code=trust_remote_code)


def _causal_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Return the configuration of the causal language model. Raises UserError if there is none."""
    config = text_part(config)
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_own_code:
        raise UserError(
            f"language model {name} is of type {config.model_type!r}, which is not a causal language model; "
            "choose a decoder-only one (Llama, Qwen, GPT, OPT, ...)"
        )
    return config


def _named_tokenizer(folder: Path, config: PreTrainedConfig) -> str | None:
    """Return the tokenizer named in the configuration of a model that comes without one, such as MPT."""
    return None if has_vocabulary(folder) else getattr(config, "tokenizer_name", None)


def _check_not_yet_quantized(config: PreTrainedConfig, name: str, quantization: Quantization | None) -> None:
    stored = getattr(config, "quantization_config", None)
    if stored is not None and quantization is not None:
        method = dict(stored).get("quant_method", "an unknown method")
        raise UserError(
            f"language model {name}: quantization {quantization.format} given, but it is already quantized "
            f"({method}); set quantization to none, or give the unquantized model"
        )


def _check_not_an_encoder(config: PreTrainedConfig, name: str) -> None:
    """Refuse encoders: they are causal only if their configuration sets is_decoder."""
    is_encoder_family = type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type == "bert-generation"
    if is_encoder_family and not getattr(config, "is_decoder", True):
        raise UserError(
            f"language model {name} is a {config.model_type} encoder, whose tokens attend to later ones; "
            f"choose a decoder-only model, or set is_decoder in its {CONFIG_FILE} if it was trained as one"
        )


def _check_complete(missing_keys: Iterable[str], name: str) -> None:
    """Refuse a model with missing weights: transformers initializes them at random with only a warning."""
    keys = sorted(missing_keys)
    if keys:
        raise UserError(
            f"the files of language model {name} lack {len(keys)} of its tensors ({keys[0]}, ...); "
            "give one that was saved whole, with its language-modelling head"
        )
