"""The models that OpenFlamingo released (arXiv:2308.01390), and what each of them was trained with.

Names, language models and intervals are those of the table in OpenFlamingo's README and, for the first
release, of its README before v2. Perceiver and cross-attention have the default sizes of a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flamingo_ft.hub import hub_name

TOWER = ("ViT-L-14", "openai")
# the same weights by another of OpenCLIP's names
SAME_TOWER = ("hf-hub:timm/vit_large_patch14_clip_224.openai", None)
TOWER_WIDTH = 1024


@dataclass(frozen=True)
class ReleasedModel:
    """A released checkpoint on the Hub.

    languages: names of its language model on the Hub, the preferred one first, with ``layers`` decoder layers
    of ``width`` at ``layers_path``. interval: cross_attn_every_n_layers. visibility: values of
    media_visibility that it was trained for, the preferred one first.
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
        """Indices of the decoder layers with a cross-attention block before them."""
        return tuple(range(self.interval - 1, self.layers, self.interval))

    def required_keys(self) -> str:
        """Return the recipe keys that a run from this model needs."""
        vision = f"model.vision {{name: {TOWER[0]}, pretrained: {TOWER[1]}}}"
        rest = f"cross_attn_every_n_layers {self.interval} and media_visibility {self.visibility[0]}"
        return f"model.language.name {self.languages[0]}, {vision}, {rest}"


def _mpt_1b(name: str, suffix: str) -> ReleasedModel:
    languages = tuple(f"{owner}/mpt-1b-redpajama-200b{suffix}" for owner in ("anas-awadalla", "mosaicml"))
    return ReleasedModel(name, languages, "transformer.blocks", width=2048, layers=24, interval=1)


def _incite_3b(name: str, kind: str) -> ReleasedModel:
    languages = (f"togethercomputer/RedPajama-INCITE-{kind}-3B-v1",)
    return ReleasedModel(name, languages, "gpt_neox.layers", width=2560, layers=32, interval=2)


RELEASED_MODELS = (
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
    # v1: in training its text saw, at random, the image before it or the one after it; in use, the one after
    # it.
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
# The Hub ignores case.
_BY_NAME: Mapping[str, ReleasedModel] = {model.name.lower(): model for model in RELEASED_MODELS}
_IN_CACHE = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<model>[^/]+)/snapshots/")


def find_released(place: str | Path) -> ReleasedModel | None:
    """Return the released model of a name on the Hub, or of a file in the Hugging Face cache; else None."""
    name = hub_name(place)
    if name is not None:
        return _BY_NAME.get(name.repository.lower())
    match = _IN_CACHE.search(Path(place).absolute().as_posix())
    return _BY_NAME.get(f"{match['owner']}/{match['model']}".lower()) if match else None
