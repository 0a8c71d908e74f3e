"""The Flamingos that OpenFlamingo released (arXiv:2308.01390), and what each of them was trained with.

Names, language models and intervals are those of the table in OpenFlamingo's README and, for its first release, of
that README before v2. Their perceiver and cross-attention have the sizes that a recipe has by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flamingo_ft.hub import hub_name

TOWER = ("ViT-L-14", "openai")
SAME_TOWER = (
    "hf-hub:timm/vit_large_patch14_clip_224.openai",
    None,
)  # these weights under another name of OpenCLIP's
TOWER_WIDTH = 1024


@dataclass(frozen=True)
class ReleasedModel:
    """A checkpoint on the Hub.

    languages: names of its language model on the Hub, the one to use first; it has ``width`` and ``layers`` decoder
    layers, at ``layers_path``. interval: cross_attn_every_n_layers. visibility: which images its text may look at, the
    one to use first.
    """

    name: str
    languages: tuple[str, ...]
    layers_path: str
    width: int
    layers: int
    interval: int
    visibility: tuple[str, ...] = ("immediate",)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The decoder layers with cross-attention before them."""
        return tuple(range(self.interval - 1, self.layers, self.interval))

    def needs(self) -> str:
        """What a recipe says to start from it."""
        vision = f"model.vision {{name: {TOWER[0]}, pretrained: {TOWER[1]}}}"
        rest = f"cross_attn_every_n_layers {self.interval} and media_visibility {self.visibility[0]}"
        return f"model.language.name {self.languages[0]}, {vision}, {rest}"


def _mpt_1b(name: str, kind: str) -> ReleasedModel:
    languages = tuple(f"{owner}/mpt-1b-redpajama-200b{kind}" for owner in ("anas-awadalla", "mosaicml"))
    return ReleasedModel(name, languages, "transformer.blocks", width=2048, layers=24, interval=1)


def _incite_3b(name: str, kind: str) -> ReleasedModel:
    languages = (f"togethercomputer/RedPajama-INCITE-{kind}-3B-v1",)
    return ReleasedModel(name, languages, "gpt_neox.layers", width=2560, layers=32, interval=2)


MODELS = (
    _mpt_1b("openflamingo/OpenFlamingo-3B-vitl-mpt1b", ""),
    _mpt_1b("openflamingo/OpenFlamingo-3B-vitl-mpt1b-langinstruct", "-dolly"),
    _incite_3b("openflamingo/OpenFlamingo-4B-vitl-rpj3b", "Base"),
    _incite_3b("openflamingo/OpenFlamingo-4B-vitl-rpj3b-langinstruct", "Instruct"),
    ReleasedModel(
        "openflamingo/OpenFlamingo-9B-vitl-mpt7b",
        ("anas-awadalla/mpt-7b", "mosaicml/mpt-7b"),
        "transformer.blocks",
        width=4096,
        layers=32,
        interval=4,
    ),
    # v1. In training its text looked at the image before it or the one after it, by chance; used, at the one after it.
    ReleasedModel(
        "openflamingo/OpenFlamingo-9B-deprecated",
        ("huggyllama/llama-7b", "luodian/llama-7b-hf"),
        "model.layers",
        width=4096,
        layers=32,
        interval=4,
        visibility=("following", "immediate"),
    ),
)
RELEASED: Mapping[str, ReleasedModel] = {
    model.name.lower(): model for model in MODELS
}  # the Hub does not mind the case

_IN_CACHE = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<model>[^/]+)/snapshots/")


def released(place: str | Path) -> ReleasedModel | None:
    """The released model that a name on the Hub, or a file in the Hugging Face cache, belongs to; None for others."""
    name = hub_name(place)
    if name is not None:
        return RELEASED.get(name.repository.lower())
    found = _IN_CACHE.search(Path(place).absolute().as_posix())
    return RELEASED.get(f"{found['owner']}/{found['model']}".lower()) if found else None
