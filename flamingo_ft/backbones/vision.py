"""Load vision towers of OpenCLIP and timm."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils import serialization

from flamingo_ft.backbones.compat import find_weights_in_folder, load_visual_state_dict
from flamingo_ft.backbones.freed_memory import freed_memory_returned
from flamingo_ft.backbones.provenance import tensors_sha256
from flamingo_ft.backbones.quantization import Quantization, require_bitsandbytes
from flamingo_ft.backbones.timm_tower import is_timm, load_timm_tower
from flamingo_ft.backbones.tower import (
    apply_options,
    build_visual,
    config_with_options,
    non_persistent_buffers,
    quantize_tower,
    tower_preprocess,
)
from flamingo_ft.backbones.tower_source import TowerSource, find_tower, native_tower_config, recorded_names
from flamingo_ft.backbones.visual_tokens import DEFAULT_TOKENS, TokenOptions, token_width
from flamingo_ft.config import VisionSection
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.machine_errors import reraise_machine_error
from flamingo_ft.processes import default_device

# Raised by open_clip, torch and safetensors for files that are missing, damaged or of another architecture.
UNLOADABLE = (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, SafetensorError)
LOAD_CONFIG: Any = serialization.config  # torch's options of torch.load
NUMPY_SUFFIXES = (".npz", ".npy")  # of big_vision's weights: OpenCLIP copies them into the tower one by one


@dataclass(frozen=True)
class VisionBackbone:
    """A vision tower, and what is needed to rebuild it, to preprocess its images and to identify it.

    visual: OpenCLIP's `.visual`, or a `TimmTower`; frozen and in eval mode.
    config: JSON-able {"embed_dim", "vision_cfg", "quick_gelu"} for `build_visual`, or {"vision_cfg", "timm"}
        for a timm model; also "image_size" if that is not the architecture's, and what `TokenOptions`
        records.
    preprocess: JSON-able fields of OpenCLIP's PreprocessCfg, for `image_transform`.
    width: D, the width of its spatial tokens.
    source: {"name", "pretrained", "revision", "sha256", "quantization", "image_size"} and what
        `TokenOptions` records, with absolute paths for folders and files; the hash is of the tower's tensors
        before resizing and quantization.
    license: as stated on its model card; None if it is not.
    """

    visual: nn.Module
    config: dict
    preprocess: dict
    width: int
    source: dict
    license: str | None = None


@freed_memory_returned()
def load_vision(
    name: str,
    pretrained: str | None = None,
    revision: str | None = None,
    quantization: Quantization | None = None,
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype | None = None,
    image_size: int | None = None,
    resize_mode: str | None = None,
    tokens: TokenOptions = DEFAULT_TOKENS,
) -> VisionBackbone:
    """Load a tower, frozen and in eval mode.

    name: "nano"; an OpenCLIP architecture; "hf-hub:org/name" for an OpenCLIP model; "timm/NAME" or
        "timm/NAME.TAG" for a timm model with its own weights; or a folder in OpenCLIP's local-dir format or
        with timm's config.json and weights.
    pretrained: for an architecture, one of its tags or a file with weights; None gives random weights.
    revision: commit, branch or tag of the Hub repository with the weights; None is its main branch.
    quantization: format of its matrices; the other parameters are then in the compute dtype.
    device: None is the CPU or, with quantization, the GPU if there is one.
    dtype: of an unquantized tower; None is float32.
    image_size: height and width in pixels, position embeddings interpolated; None for the tower's own.
    resize_mode: "shortest" (then cropped), "longest" (then padded) or "squash"; None for the tower's own.
    tokens: the layer that the tokens are read from, and whether neighbours are joined.

    A tag trained with QuickGELU gets QuickGELU whatever the architecture's name says: OpenCLIP 3 only warns
    (as for ViT-L-14 with tag openai), and the tokens would not be those that OpenFlamingo's weights were
    trained on. A file with weights must fit the architecture as named, and gets OpenCLIP's default
    preprocessing.

    Raises UserError for an unknown name or tag, a failed download, weights that do not fit, a tower without
    matrices to quantize, and an unsupported image size, layer or pixel shuffle.
    """
    if quantization is not None:
        require_bitsandbytes(f"quantization {quantization.format}")
    tower = find_tower(name, pretrained, revision)
    if revision and tower.revision is None:
        raise UserError(f"revision {revision} given for {name}, which is not on the Hub; remove the revision")
    config = config_with_options(name, tower.config, image_size, tokens)
    visual, sha256 = _load(tower) if quantization is None else _load_memory_mapped(tower)
    visual.eval().requires_grad_(False)
    apply_options(visual, config)
    if quantization is not None:
        device = device or default_device()
        quantize_tower(visual, quantization, device)
        _copy_from_file(visual)
        visual.to(quantization.dtype)
    elif dtype is not None:
        visual.to(dtype)
    recorded_name, recorded_pretrained = recorded_names(name, pretrained)
    return VisionBackbone(
        visual=visual if device is None else visual.to(device),
        config=config,
        preprocess=tower_preprocess(visual, tower.preprocess, resize_mode),
        width=token_width(visual),
        source={
            "name": recorded_name,
            "pretrained": recorded_pretrained,
            "revision": tower.revision,
            "sha256": sha256,
            "quantization": quantization.record() if quantization else None,
            "image_size": image_size,
            **tokens.record(),
        },
        license=tower.license(),
    )


def tower_config(
    name: str,
    pretrained: str | None = None,
    image_size: int | None = None,
    tokens: TokenOptions = DEFAULT_TOKENS,
) -> dict:
    """Return the `VisionBackbone.config` of a tower without loading its weights.

    From a Hub repository, only the configuration is downloaded. Raises the same errors as `load_vision`.
    """
    return config_with_options(name, native_tower_config(name, pretrained), image_size, tokens)


def load_recipe_vision(
    section: VisionSection, dtype: torch.dtype | None = None, *, shardable: bool = False
) -> VisionBackbone:
    """Load the tower of a recipe on the device that it is trained on; see `load_vision`.

    shardable: whether quantized matrices are stored so that they can be sharded.
    """
    return load_vision(
        section.name,
        section.pretrained,
        quantization=Quantization.of(section, shardable=shardable),
        device=default_device(),
        dtype=dtype,
        image_size=section.image_size,
        resize_mode=section.resize_mode,
        tokens=TokenOptions(section.layer, section.pixel_shuffle),
    )


def recipe_tower_config(section: VisionSection) -> dict:
    """Return the `VisionBackbone.config` of a recipe's tower without loading its weights."""
    tokens = TokenOptions(section.layer, section.pixel_shuffle)
    return tower_config(section.name, section.pretrained, section.image_size, tokens)


# --- Loading weights


def _load(tower: TowerSource) -> tuple[nn.Module, str]:
    """Return the tower, with random weights if it has none, and its content hash.

    OpenCLIP's text tower is discarded.
    """
    if not tower.has_weights:
        visual = build_visual(tower.config)
        return visual, tensors_sha256(visual)
    with _loading_errors(tower):
        if is_timm(tower.config):
            visual = load_timm_tower(tower.model)
            return visual, tensors_sha256(visual)
        model: Any = open_clip.create_model(
            tower.model,
            pretrained=tower.weights,
            force_quick_gelu=tower.config["quick_gelu"],
            require_pretrained=True,
        )
    return model.visual, tensors_sha256(model.visual)


class TensorsInDtypes(Mapping[str, Tensor]):
    """Tensors in other dtypes, each converted on access."""

    def __init__(self, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]):
        self._tensors = tensors
        self._dtypes = dtypes

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(self._dtypes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _load_memory_mapped(tower: TowerSource) -> tuple[nn.Module, str]:
    """Return what `_load` does, without a second copy of the tower in memory: for quantization.

    OpenCLIP builds both towers with random weights and loads the file beside them: three times the tower.
    Here the tower is built on the meta device and takes the tensors of the file, in its dtypes and memory-
    mapped if its format allows it. The hash is of the tensors in the dtypes that `_load` gives them.
    """
    file = _weights_file(tower)
    if file is None:
        return _load(tower)
    buffers = non_persistent_buffers(tower.config)
    with torch.device("meta"):
        visual = build_visual(tower.config)
    dtypes = {name: tensor.dtype for name, tensor in visual.state_dict().items()}
    # torch cannot map files of its format before 1.6, which are not zip archives.
    with _loading_errors(tower), LOAD_CONFIG.patch({"load.mmap": zipfile.is_zipfile(file)}):
        visual.load_state_dict(load_visual_state_dict(file, visual), strict=True, assign=True)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(visual.get_submodule(owner), leaf, buffer)
    return visual, tensors_sha256(TensorsInDtypes(visual.state_dict(), dtypes))


def _weights_file(tower: TowerSource) -> Path | None:
    """Return the file that `open_clip.create_model` would load; None without one, or for NumPy arrays.

    None for a timm model too: timm converts its own older formats while it loads them.
    """
    if not tower.has_weights or is_timm(tower.config):
        return None
    file = tower.weights or find_weights_in_folder(Path(tower.model.removeprefix("local-dir:")))
    return None if file is None or Path(file).suffix in NUMPY_SUFFIXES else Path(file)


def _copy_from_file(visual: nn.Module) -> None:
    """Copy the unquantized tensors, which may be mapped from a file that could change or be removed."""
    for tensor in (*visual.parameters(), *visual.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()


@contextmanager
def _loading_errors(tower: TowerSource) -> Generator[None]:
    """Raise UserError, in one line, for a file that cannot be loaded."""
    file = tower.weights or tower.model
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} holds more than plain weights, or is damaged; save it again") from error
    except UNLOADABLE as error:
        reraise_machine_error(error)
        raise UserError(
            f"cannot load {file} as {tower.model}: {error_message(error)}; "
            "check that weights and architecture belong together"
        ) from error
