"""A composition: the base of adapters as a folder without the weights of its backbones.

It holds the Flamingo's configuration, which names both backbones with their revisions and content hashes, the
processor's files, a card, and ``bridge.safetensors`` where adapters build on a bridge. An adapter names it as its base,
so that transformers and PEFT find all that the adapter needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors.torch import save_file

from flamingo_ft.atomic import file_in_place
from flamingo_ft.backbones.identity import tensors_sha256
from flamingo_ft.errors import UserError
from flamingo_ft.hub import existing, fetch_model
from flamingo_ft.hub.places import BACKBONE_KEYS, strip_local_paths
from flamingo_ft.hub.weight_files import ADAPTER_CONFIG
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration
from flamingo_ft.version import __version__

from .answering import answer_greedily
from .card import CARD
from .files import (
    BRIDGE_FILE,
    read_config,
    read_flamingo_config,
    read_lora_config,
    read_processor,
)
from .load import join_backbones, put_together
from .lora import updates_the_tower
from .save import forget_place, save_processor
from .start import bridge_of, put_as_stored
from .trainable import BACKBONES


def write_composition(adapter: str | Path, out: str | Path, *, start: str | Path | None = None) -> None:
    """Write the base of ``adapter`` to ``out``. The same base gives the same bytes.

    start: where the bridge that the adapter builds on lies now, if not where it lay in training.

    Raises UserError when ``out`` exists, ``adapter`` is no adapter, and where it builds on a bridge that is gone or
    another.
    """
    adapter, start, out = fetch_model(adapter), None if start is None else fetch_model(start), Path(out)
    if out.exists():
        raise UserError(f"{out}: exists already, and nothing is overwritten; choose another folder")
    config, processor = read_config(adapter), read_processor(adapter)
    bridge = _bridge_below(adapter, config, start) if config.bridge_init else None
    lora = read_lora_config(adapter)
    config.open_attention = config.open_attention or (lora is not None and updates_the_tower(lora))
    forget_place(config)
    out.mkdir(parents=True)
    if bridge is not None:
        config.bridge_init["path"] = BRIDGE_FILE
        with file_in_place(out / BRIDGE_FILE) as file:
            save_file(bridge, file, metadata={"format": "pt"})
    config.save_pretrained(out)
    save_processor(processor, out)
    _write_card(config, out)


def load_composition(folder: str | Path, **options: Any) -> FlamingoForConditionalGeneration:
    """The model of a composition, which is the base of its adapters. Takes the options of `load_base`.

    Raises UserError when a backbone or the bridge is not the recorded one.
    """
    folder = existing(folder)
    config = read_flamingo_config(folder)
    _check_named(folder, config)
    bridge = folder / BRIDGE_FILE
    if config.bridge_init:
        config.bridge_init["path"] = str(bridge.resolve())
    model = put_together(folder, config, bridge, **options)
    answer_greedily(model, read_processor(folder))
    return model.eval().requires_grad_(False)


def name_base(adapter: str | Path, base: str) -> None:
    """Write into an adapter's folder which composition is its base: a folder, or ``org/name`` on the Hub."""
    path = Path(adapter) / ADAPTER_CONFIG
    values = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def _bridge_below(adapter: Path, config: FlamingoConfig, start: str | Path | None) -> dict[str, torch.Tensor]:
    """The bridge that an adapter builds on, as its content hash is of it.

    The backbones are loaded along: rows that a checkpoint gives to new tokens are read through the language model.
    """
    model = join_backbones(adapter, config, quantized=False, dtype=None, device=torch.device("cpu"))
    before = _backbones_sha256(model)
    put_as_stored(model, adapter, config.bridge_init, start)
    if _backbones_sha256(model) != before:
        raise UserError(
            f"{adapter}: builds on a checkpoint that has backbones of its own, which a composition cannot name; merge the "
            "adapter, and give the merged model"
        )
    return {name: tensor.contiguous() for name, tensor in sorted(bridge_of(model).items())}


def _backbones_sha256(model: FlamingoForConditionalGeneration) -> str:
    """Digest of both backbones, without the rows that the Flamingo has tables of its own for."""
    lm, ids = model.lang_encoder, torch.tensor(model.config.new_token_ids or [], dtype=torch.long)
    vocabulary = [
        id(module.weight) for module in (lm.get_input_embeddings(), lm.get_output_embeddings()) if module
    ]
    named = ((name, p) for name, p in model.named_parameters() if name.startswith(tuple(BACKBONES.values())))
    return tensors_sha256(
        {name: p.detach().index_fill(0, ids, 0) if id(p) in vocabulary else p for name, p in named}
    )


def _check_named(folder: Path, config: FlamingoConfig) -> None:
    if not all((config.backbones or {}).get(part) for part in ("vision", "language")):
        raise UserError(
            f"{folder}: has neither weights nor the names of its backbones, so there is nothing to load; copy it again"
        )


def _write_card(config: FlamingoConfig, folder: Path) -> None:
    environment = Environment(loader=PackageLoader("flamingo_ft.adapters", ""), undefined=StrictUndefined)
    text = environment.get_template("composition.md.jinja").render(
        version=__version__,
        vision=strip_local_paths(config.backbones["vision"], BACKBONE_KEYS),
        language=strip_local_paths(config.backbones["language"], BACKBONE_KEYS),
        bridge_init=config.bridge_init,
        kept_in=lambda source: (source.get("quantization") or {}).get("format", "full"),
    )
    (folder / CARD).write_text(text + "\n", encoding="utf-8")
