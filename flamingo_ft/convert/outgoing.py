"""An adapter or a whole model -> checkpoints that OpenFlamingo and Otter load."""

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
from flamingo_ft.backbones.attention import close_attention
from flamingo_ft.backbones.quantization import formats_in
from flamingo_ft.errors import UserError
from flamingo_ft.formats import clip, otter
from flamingo_ft.formats.recognise import BRIDGE, OPEN_FLAMINGO, OPEN_FLAMINGO_1, OTTER
from flamingo_ft.hub import fetch_model
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS, CONFIG_FILE, PYTORCH_FILENAME_PATTERN, PYTORCH_INDEX
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .otter_config import ANSWER_TOKEN, otter_config, otter_notes
from .report import Conversion
from .vocabulary import LANGUAGE, whole_matrices

# What OpenFlamingo's and Otter's constructors make, without a choice.
THEIR_PERCEIVER = {"num_latents": 64, "depth": 6, "heads": 8, "dim_head": 64, "ff_mult": 4}
THEIR_CROSS_ATTENTION = {"heads": 8, "dim_head": 64, "ff_mult": 4}
LARGEST_FILE = "5GB"
EMBEDDING = "embed"  # what OpenFlamingo saves of the language model though it is frozen


@dataclass(frozen=True)
class Loaded:
    """A Flamingo in the computer's memory, LoRA folded in. kind: what it came from; folded: names of the matrices that
    took an update in; holds_all: whether its backbones' weights are nowhere else. notes: what else there is to tell."""

    model: FlamingoForConditionalGeneration
    processor: FlamingoProcessor
    kind: str
    folded: tuple[str, ...]
    holds_all: bool
    notes: tuple[str, ...]


def export_open_flamingo(
    source: str | Path, out: str | Path, *, start: str | Path | None = None
) -> Conversion:
    """Write a checkpoint that open-flamingo loads with ``load_state_dict(..., strict=False)``, to the file ``out``.

    It holds bridge and vocabulary, and of the backbones what an update was folded into; of a whole model all. A model that
    sees the following image becomes one of version 1, which had that. source: a folder or a name on the Hub. start: where the
    bridge that an adapter builds on is now. Raises UserError for what open-flamingo cannot express.
    """
    out, loaded = Path(out), _load(source, out, start)
    _check_theirs(loaded, source, "OpenFlamingo", ("immediate", "following"))
    is_first = loaded.model.config.media_visibility == "following"
    language = _language(loaded, len(loaded.processor.tokenizer), whole=loaded.holds_all)
    tensors = _bridge(loaded, also=is_first) | language | _vision(loaded)
    out.parent.mkdir(parents=True, exist_ok=True)
    with file_in_place(out) as file:
        torch.save(tensors, file)
    lines = [f"{len(tensors)} tensors", *loaded.notes, *_about_loading(loaded)]
    return Conversion(loaded.kind, f"{OPEN_FLAMINGO_1 if is_first else OPEN_FLAMINGO} checkpoint", out, lines)


def export_otter(source: str | Path, out: str | Path, *, start: str | Path | None = None) -> Conversion:
    """Write a folder in Otter's form (configuration and all weights, the tower as transformers' CLIP) to ``out``.

    As `export_open_flamingo` otherwise; the tower has to be a CLIP ViT. What Otter's own code cannot open is told.
    """
    out, loaded = Path(out), _load(source, out, start)
    _check_theirs(loaded, source, "Otter", ("immediate",), positions=("max_num_frames",))
    config = otter_config(loaded.model, source)
    tower = {name: t for name, t in loaded.model.state_dict().items() if name.startswith(clip.HERE)}
    # Its constructor makes as many rows as the configuration says, and changes that for no family but LLaMA.
    tensors = _bridge(loaded) | _language(loaded, None, whole=True) | clip.from_open_clip(tower)
    tensors = {otter.to_otter(name): tensor.contiguous() for name, tensor in tensors.items()}
    with folder_in_place(out) as folder:
        (folder / CONFIG_FILE).write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        _write_shards(tensors, folder)
        loaded.processor.tokenizer.save_pretrained(folder)
    lines = [f"{len(tensors)} tensors", *loaded.notes, *otter_notes(loaded.model, loaded.processor)]
    return Conversion(loaded.kind, f"{OTTER} folder", out, lines)


def _load(source: str | Path, out: Path, start: str | Path | None) -> Loaded:
    folder = fetch_model(source)
    if out.exists():
        raise UserError(f"{out}: exists already, and nothing is overwritten; choose another place")
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{source}: no adapter and no model of this package; give the folder that a run or a merge wrote"
        )
    config = read_flamingo_config(folder)
    processor = read_processor(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        model = FlamingoForConditionalGeneration.from_pretrained(folder)
        if formats_in(model):
            raise UserError(f"{source}: was written quantized; convert the adapter, or an unquantized merge")
        return Loaded(model.eval(), processor, "model", (), True, ())
    read_config(folder)
    kept = sorted(
        {record["format"] for part in config.backbones.values() if (record := part.get("quantization"))}
    )
    notes = (
        [f"it was trained on backbones in {' and '.join(kept)}; this is of the unquantized ones"]
        if kept
        else []
    )
    model = load_base(folder, start=start, quantized=False, dtype="auto", device="cpu")
    load_adapter_into(model, folder)
    folded = tuple(
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, LoraLayer)
    )
    fold_lora(model)
    close_attention(model.vision_encoder)
    return Loaded(model.eval(), processor, "adapter", folded, False, tuple(notes))


def _check_theirs(
    loaded: Loaded, source: object, whose: str, visibility: tuple[str, ...], positions: tuple[str, ...] = ()
) -> None:
    """Refuse a bridge that their constructors do not make, with every setting that differs."""
    config = loaded.model.config
    perceiver = {key: value for key, value in (config.perceiver or {}).items() if key not in positions}
    wrong = [
        *_differences("model.perceiver", perceiver, THEIR_PERCEIVER),
        *_differences("model.cross_attention", config.cross_attention or {}, THEIR_CROSS_ATTENTION),
    ]
    if config.media_visibility not in visibility:
        wrong.append(f"model.media_visibility {config.media_visibility} (needs {' or '.join(visibility)})")
    if wrong:
        found = f"{whose} can load only a bridge with its own fixed settings, got {', '.join(wrong)}"
        raise UserError(f"{source}: {found}; it cannot be converted: train with the settings needed")


def _differences(section: str, found: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Each setting that differs from theirs; one that is null or not given is the default, which is theirs."""
    given = {key: value for key, value in found.items() if value is not None}
    for key, value in (dict(theirs) | given).items():
        needed = theirs.get(key)
        if value != needed:
            yield f"{section}.{key} {value} (needs {'null' if needed is None else needed})"


def _bridge(loaded: Loaded, also: bool = False) -> dict[str, Tensor]:
    """Perceiver, and cross-attention inside the language model's layers; also: under its second name of version 1 too."""
    layers, found = f"{LANGUAGE}{loaded.model.decoder_layers_attr_name}.", {}
    for name, tensor in loaded.model.state_dict().items():
        tensor = _as_its_part(name, tensor, loaded.model)
        if name.startswith("gated_cross_attn_layers."):
            _, k, rest = name.split(".", 2)
            found[f"{layers}{k}.gated_cross_attn_layer.{rest}"] = tensor
            found |= {LANGUAGE + name: tensor} if also else {}
        elif name.startswith(BRIDGE):
            found[name] = tensor
    return found


def _as_its_part(name: str, tensor: Tensor, model: FlamingoForConditionalGeneration) -> Tensor:
    """A gate, which this package keeps in float32, in the number format of what it gates, where that loses nothing."""
    if not name.endswith("_gate"):
        return tensor
    rounded = tensor.to(model.get_parameter(name.rpartition(".")[0] + ".attn.norm.weight").dtype)
    return rounded if rounded.to(tensor.dtype).equal(tensor) else tensor


def _language(loaded: Loaded, vocabulary: int | None, whole: bool) -> dict[str, Tensor]:
    """The matrices of the vocabulary, ``vocabulary`` rows or all, and what else is embedded, as OpenFlamingo keeps them; and
    all the others, or those that took an update in, under the wrapped layers' names."""
    layers = f"{LANGUAGE}{loaded.model.decoder_layers_attr_name}."
    found = whole_matrices(loaded.model, vocabulary)
    tied = set(loaded.model.lang_encoder.all_tied_weights_keys)
    for name, parameter in loaded.model.lang_encoder.state_dict().items():
        name_here = LANGUAGE + name
        if (
            name_here in found
            or name in tied
            or not (whole or name_here in loaded.folded or EMBEDDING in name)
        ):
            continue
        inside = name_here.removeprefix(layers)
        k, _, rest = inside.partition(".")
        found[f"{layers}{k}.decoder_layer.{rest}" if inside != name_here else name_here] = parameter
    return found


def _vision(loaded: Loaded) -> dict[str, Tensor]:
    """What of the tower is not what its name leads to: all of a whole model's, and what took an update in."""
    updated = any(name.startswith(clip.HERE) for name in loaded.folded)
    tower = loaded.model.state_dict().items() if loaded.holds_all or updated else ()
    return {name: tensor for name, tensor in tower if name.startswith(clip.HERE)}


def _about_loading(loaded: Loaded) -> list[str]:
    config = loaded.model.config
    source = config.backbones or {}
    names = [(source.get(part) or {}).get("name") for part in ("language", "vision")]
    lines = [
        f"to be loaded beside language model {names[0]} and tower {names[1]}, cross_attn_every_n_layers "
        f"{config.cross_attn_every_n_layers}, with load_state_dict(torch.load(FILE), strict=False)"
    ]
    if ANSWER_TOKEN in loaded.processor.tokenizer.get_vocab():
        lines.append(
            f"its tokenizer has {ANSWER_TOKEN}, which open-flamingo's lacks: use the one of {loaded.kind}"
        )
    return lines


def _write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """As transformers wrote them when Otter was made: torch's files, with an index where there are several."""
    options: dict[str, Any] = {
        "max_shard_size": LARGEST_FILE,
        "filename_pattern": PYTORCH_FILENAME_PATTERN,
    }
    split = split_torch_state_dict_into_shards(tensors, **options)
    for file, names in split.filename_to_tensors.items():
        torch.save({name: tensors[name] for name in names}, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / PYTORCH_INDEX).write_text(text, encoding="utf-8")
