"""Export an adapter or a whole model as a checkpoint that OpenFlamingo or Otter loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft.tuners.lora import LoraLayer
from torch import Tensor

from flamingo_ft.adapters.files import read_config, read_flamingo_config, read_processor
from flamingo_ft.adapters.load import load_adapter_into, load_base
from flamingo_ft.adapters.merge import fold_lora
from flamingo_ft.atomic import file_in_place, folder_in_place
from flamingo_ft.backbones.attention import restore_fused_attention
from flamingo_ft.backbones.quantization import quantization_formats
from flamingo_ft.backbones.visual_tokens import TokenOptions
from flamingo_ft.errors import UserError
from flamingo_ft.formats.foreign_checkpoint import BRIDGE_PREFIXES, OPEN_FLAMINGO, OPEN_FLAMINGO_1, OTTER
from flamingo_ft.formats.key_names import (
    ANSWER_TOKEN,
    EARLIER_GPT_NEOX_HEAD,
    GPT_NEOX_HEAD,
    GPT_NEOX_LAYERS,
    VISION_PREFIX,
    from_open_clip,
    to_otter_name,
)
from flamingo_ft.hub import fetch_model
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS, CONFIG_FILE, PYTORCH_FILENAME_PATTERN, PYTORCH_INDEX
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .importer import Conversion
from .load_into_model import LANGUAGE_PREFIX, vocabulary_matrices
from .otter_config import otter_config, otter_notes

# Sizes that the constructors of OpenFlamingo and Otter hard-code.
THEIR_PERCEIVER = {"num_latents": 64, "depth": 6, "heads": 8, "dim_head": 64, "ff_mult": 4}
THEIR_CROSS_ATTENTION = {"heads": 8, "dim_head": 64, "ff_mult": 4}
MAX_SHARD_SIZE = "5GB"
EMBEDDING = "embed"  # OpenFlamingo saves parameters with this in their name even when they are frozen


@dataclass(frozen=True)
class _Source:
    """The model to export, on the CPU, with LoRA folded in.

    kind: "adapter" or "model". folded: names of the matrices that LoRA was folded into.
    has_own_backbones: whether the weights of its backbones are stored nowhere else. notes: for the user.
    """

    model: FlamingoForConditionalGeneration
    processor: FlamingoProcessor
    kind: str
    folded: tuple[str, ...]
    has_own_backbones: bool
    notes: tuple[str, ...]


def export_open_flamingo(
    source: str | Path, out: str | Path, *, start: str | Path | None = None
) -> Conversion:
    """Write a checkpoint that open-flamingo loads with ``load_state_dict(..., strict=False)`` to the file
    ``out``.

    It holds the bridge, the vocabulary matrices and the backbone matrices that LoRA was folded into; for a
    whole model, all weights. A model whose text attends to the following image is written in the format of
    version 1, which had that.

    source: a folder or a name on the Hub. start: where the bridge that an adapter builds on is now.
    Raises UserError for a model that open-flamingo cannot express.
    """
    out = Path(out)
    loaded = _load_source(source, out, start)
    _check_compatible(loaded, source, "OpenFlamingo", ("immediate", "following"))
    is_first_version = loaded.model.config.media_visibility == "following"
    tensors = _bridge_tensors(loaded, with_aliases=is_first_version)
    tensors |= _language_tensors(loaded, len(loaded.processor.tokenizer), whole=loaded.has_own_backbones)
    tensors |= _vision_tensors(loaded)
    if loaded.model.decoder_layers_attr_name == GPT_NEOX_LAYERS:
        tensors[EARLIER_GPT_NEOX_HEAD] = tensors[GPT_NEOX_HEAD]  # for open-flamingo on transformers 4
    out.parent.mkdir(parents=True, exist_ok=True)
    with file_in_place(out) as file:
        torch.save(tensors, file)
    lines = [f"{len(tensors)} tensors", *loaded.notes, *_open_flamingo_notes(loaded)]
    result = f"{OPEN_FLAMINGO_1 if is_first_version else OPEN_FLAMINGO} checkpoint"
    return Conversion(loaded.kind, result, out, lines)


def export_otter(source: str | Path, out: str | Path, *, start: str | Path | None = None) -> Conversion:
    """Write a folder as Otter saves it to ``out``: configuration and all weights, the tower as transformers'
    CLIP.

    source and start are those of `export_open_flamingo`. Raises UserError for a model that Otter cannot
    express, such as one whose tower is no CLIP ViT; the result's notes say what Otter's own code cannot load.
    """
    out = Path(out)
    loaded = _load_source(source, out, start)
    _check_compatible(loaded, source, "Otter", ("immediate",), ignored=("max_num_frames",))
    config = otter_config(loaded.model, source)
    tower = {name: t for name, t in loaded.model.state_dict().items() if name.startswith(VISION_PREFIX)}
    # All rows of the vocabulary: Otter's constructor builds as many as config.json says, and resizes only
    # LLaMA's.
    tensors = _bridge_tensors(loaded) | _language_tensors(loaded, None, whole=True) | from_open_clip(tower)
    tensors = {to_otter_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    with folder_in_place(out) as folder:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        _write_shards(tensors, folder)
        loaded.processor.tokenizer.save_pretrained(folder)
    lines = [f"{len(tensors)} tensors", *loaded.notes, *otter_notes(loaded.model, loaded.processor)]
    return Conversion(loaded.kind, f"{OTTER} folder", out, lines)


# --- Loading and checking


def _load_source(source: str | Path, out: Path, start: str | Path | None) -> _Source:
    folder = fetch_model(source)
    if out.exists():
        raise UserError(f"{out}: already exists and is not overwritten; choose another path")
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{source}: not an adapter or model of flamingo-ft; give the folder that a run or a merge wrote"
        )
    config = read_flamingo_config(folder)
    processor = read_processor(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        model = FlamingoForConditionalGeneration.from_pretrained(folder)
        if quantization_formats(model):
            raise UserError(f"{source}: saved quantized; convert the adapter, or an unquantized merge")
        return _Source(model.eval(), processor, "model", (), True, ())
    read_config(folder)
    model = load_base(folder, start=start, quantized=False, dtype="auto", device="cpu")
    load_adapter_into(model, folder)
    folded = tuple(
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, LoraLayer)
    )
    fold_lora(model)
    restore_fused_attention(model.vision_encoder)
    return _Source(
        model.eval(), processor, "adapter", folded, False, _quantization_notes(config.backbones or {})
    )


def _quantization_notes(backbones: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    records = (part.get("quantization") for part in backbones.values())
    formats = sorted({record["format"] for record in records if record})
    if not formats:
        return ()
    return (f"it was trained on backbones in {' and '.join(formats)}; this is written from unquantized ones",)


def _check_compatible(
    loaded: _Source,
    source: object,
    project: str,
    visibilities: tuple[str, ...],
    ignored: tuple[str, ...] = (),
) -> None:
    """Refuse a bridge that the project's constructor cannot build, naming every setting that differs.

    ignored: settings of the perceiver that the project does support.
    """
    config = loaded.model.config
    perceiver = {key: value for key, value in (config.perceiver or {}).items() if key not in ignored}
    wrong = [
        *_differences("model.perceiver", perceiver, THEIR_PERCEIVER),
        *_differences("model.cross_attention", config.cross_attention or {}, THEIR_CROSS_ATTENTION),
    ]
    tokens = TokenOptions.of(config.vision_config).record()
    wrong += [f"model.vision.{name} {value}" for name, value in tokens.items()]
    if config.media_visibility not in visibilities:
        wrong.append(f"model.media_visibility {config.media_visibility} (needs {' or '.join(visibilities)})")
    if wrong:
        problem = f"{project} can load only a bridge with its own fixed settings, got {', '.join(wrong)}"
        raise UserError(f"{source}: {problem}; it cannot be converted: train with the settings needed")


def _differences(section: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Yield each setting that differs; a setting that is null or missing has the default, which is theirs."""
    given = {key: value for key, value in ours.items() if value is not None}
    for key, value in (dict(theirs) | given).items():
        needed = theirs.get(key)
        if value != needed:
            yield f"{section}.{key} {value} (needs {'null' if needed is None else needed})"


# --- Tensors under the names of the wrapped language model


def _bridge_tensors(loaded: _Source, with_aliases: bool = False) -> dict[str, Tensor]:
    """Return the perceiver, and cross-attention inside the language model's layers.

    with_aliases: store cross-attention under the second name of version 1 as well.
    """
    layers = f"{LANGUAGE_PREFIX}{loaded.model.decoder_layers_attr_name}."
    tensors: dict[str, Tensor] = {}
    for name, tensor in loaded.model.state_dict().items():
        tensor = _gate_in_block_dtype(name, tensor, loaded.model)
        if name.startswith("gated_cross_attn_layers."):
            _, k, rest = name.split(".", 2)
            tensors[f"{layers}{k}.gated_cross_attn_layer.{rest}"] = tensor
            if with_aliases:
                tensors[LANGUAGE_PREFIX + name] = tensor
        elif name.startswith(BRIDGE_PREFIXES):
            tensors[name] = tensor
    return tensors


def _gate_in_block_dtype(name: str, tensor: Tensor, model: FlamingoForConditionalGeneration) -> Tensor:
    """Cast a gate, which is kept in float32 here, to the dtype of its block if that is exact."""
    if not name.endswith("_gate"):
        return tensor
    block = name.rpartition(".")[0]
    cast = tensor.to(model.get_parameter(f"{block}.attn.norm.weight").dtype)
    return cast if cast.to(tensor.dtype).equal(tensor) else tensor


def _language_tensors(loaded: _Source, vocabulary_size: int | None, whole: bool) -> dict[str, Tensor]:
    """Return the vocabulary matrices and other tensors of the language model, in the wrapped layers.

    vocabulary_size: number of rows to keep; None keeps all.
    whole: return every tensor, rather than those that LoRA was folded into and the embeddings.
    """
    lm: Any = loaded.model.lang_encoder
    layers = f"{LANGUAGE_PREFIX}{loaded.model.decoder_layers_attr_name}."
    tensors = _full_vocabulary(loaded.model, vocabulary_size)
    tied = set(lm.all_tied_weights_keys)
    for lm_name, tensor in lm.state_dict().items():
        name = LANGUAGE_PREFIX + lm_name
        is_needed = whole or name in loaded.folded or EMBEDDING in lm_name
        if name in tensors or lm_name in tied or not is_needed:
            continue
        if name.startswith(layers):
            k, _, rest = name.removeprefix(layers).partition(".")
            name = f"{layers}{k}.decoder_layer.{rest}"
        tensors[name] = tensor
    return tensors


def _full_vocabulary(model: FlamingoForConditionalGeneration, size: int | None) -> dict[str, Tensor]:
    """Return the vocabulary matrices (size, D) with the token rows filled in, and the bias of the output
    head.

    size: number of rows to keep; None keeps all. Tied matrices are one tensor under two names.
    """
    lm: Any = model.lang_encoder
    state = lm.state_dict()
    matrices = vocabulary_matrices(model)
    embedding_name, head_name = next(iter(matrices)), list(matrices)[-1]
    embedding = state[embedding_name.removeprefix(LANGUAGE_PREFIX)]
    full: dict[str, Tensor] = {}
    for name, rows in matrices.items():
        matrix = state[name.removeprefix(LANGUAGE_PREFIX)]
        shares_rows = name != embedding_name and rows is matrices[embedding_name]
        if shares_rows and matrix.equal(embedding):
            full[name] = full[embedding_name]
            continue
        if rows is not None and model.token_rows is not None:
            matrix = matrix.to(torch.promote_types(matrix.dtype, rows.weight.dtype), copy=True)
            matrix[list(model.token_rows.token_ids)] = rows.weight.detach().to(matrix.dtype)
        full[name] = matrix[:size].contiguous()
    bias = getattr(lm.get_output_embeddings(), "bias", None)
    if bias is not None:
        full[head_name.removesuffix("weight") + "bias"] = bias.detach()[:size]
    return full


def _vision_tensors(loaded: _Source) -> dict[str, Tensor]:
    """Return the tower's tensors if they are not those of the named tower."""
    has_lora = any(name.startswith(VISION_PREFIX) for name in loaded.folded)
    if not loaded.has_own_backbones and not has_lora:
        return {}
    return {name: t for name, t in loaded.model.state_dict().items() if name.startswith(VISION_PREFIX)}


# --- Writing


def _open_flamingo_notes(loaded: _Source) -> list[str]:
    config = loaded.model.config
    backbones = config.backbones or {}
    language, vision = ((backbones.get(part) or {}).get("name") for part in ("language", "vision"))
    notes = [
        f"load it with language model {language}, tower {vision} and cross_attn_every_n_layers "
        f"{config.cross_attn_every_n_layers}: load_state_dict(torch.load(FILE), strict=False)"
    ]
    if ANSWER_TOKEN in loaded.processor.tokenizer.get_vocab():
        notes.append(
            f"its tokenizer has {ANSWER_TOKEN}, unlike open-flamingo's: use the {loaded.kind}'s tokenizer"
        )
    return notes


def _write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write torch files, with an index for several, as transformers did when Otter was released."""
    split = split_torch_state_dict_into_shards(
        tensors, max_shard_size=MAX_SHARD_SIZE, filename_pattern=PYTORCH_FILENAME_PATTERN
    )
    for file, names in split.filename_to_tensors.items():
        torch.save({name: tensors[name] for name in names}, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / PYTORCH_INDEX).write_text(text, encoding="utf-8")
