"""OpenCLIP vision towers, loaded with their weights."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import open_clip
import torch
from safetensors import SafetensorError
from torch import nn

from flamingo_ft.backbones.device import default_device
from flamingo_ft.backbones.identity import tensors_sha256
from flamingo_ft.backbones.image_size import set_image_size
from flamingo_ft.backbones.quantization import Quantization, require_bitsandbytes
from flamingo_ft.backbones.quantized_tower import quantize_tower
from flamingo_ft.backbones.tower import (
    at_size,
    build_visual,
    non_persistent_buffers,
    token_width,
    tower_preprocess,
)
from flamingo_ft.backbones.tower_source import Located, local_source, locate, native_config
from flamingo_ft.backbones.tower_weights import StoredTensors, fill_from_file, let_go_of_file, weights_file
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.machine_errors import reraise_machine_error

# What open_clip, torch and safetensors raise for files that are missing, broken or of another architecture.
UNLOADABLE = (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, SafetensorError)


@dataclass(frozen=True)
class VisionBackbone:
    """A vision tower and what is needed to rebuild it, to feed it and to recognise it.

    visual: OpenCLIP's `.visual`, frozen and in eval mode.
    config: JSON-able {"embed_dim", "vision_cfg", "quick_gelu"}, for `build_visual`; "image_size" where it is another
        than the architecture's.
    preprocess: JSON-able fields of OpenCLIP's PreprocessCfg, for `image_transform`.
    width: D, the width of its spatial tokens.
    source: {"name", "pretrained", "revision", "sha256", "quantization", "image_size"}, folders and files by their absolute
        paths; the digest is of the tower's tensors before they were brought to another image size or quantized.
    license: as its model card states it, None where it does not.
    """

    visual: nn.Module
    config: dict
    preprocess: dict
    width: int
    source: dict
    license: str | None = None


def load_vision(
    name: str,
    pretrained: str | None = None,
    revision: str | None = None,
    quantization: Quantization | None = None,
    device: torch.device | str | None = None,
    *,
    image_size: int | None = None,
    resize_mode: str | None = None,
) -> VisionBackbone:
    """Load a tower, frozen and in eval mode.

    name: "nano"; a folder in OpenCLIP's local-dir format; "hf-hub:org/name"; or an OpenCLIP architecture.
    pretrained: for an architecture, one of its tags or a file with weights; None gives random weights.
    revision: commit, branch or tag of the Hub repository that holds the weights; None is its main branch.
    quantization: how its matrices are kept; the rest of it is then in the compute dtype.
    device: where it goes; None leaves it on the CPU, or with quantization puts it on the GPU where there is one.
    image_size: pixels (height and width) that it takes, position embeddings interpolated; None for its own.
    resize_mode: "shortest" (then cropped), "longest" (then padded) or "squash"; None for its own.

    A tag trained with QuickGELU gets QuickGELU, whatever the architecture's name says: OpenCLIP 3 only warns
    (as for ViT-L-14 with tag openai), and the tokens would not be those that OpenFlamingo's weights know.
    A file with weights is taken to fit the architecture as named, with OpenCLIP's default preprocessing.

    Raises UserError for an unknown name or tag, a download that fails, weights that do not fit, a tower without
    matrices that could be quantized, and one that cannot take the image size.
    """
    if quantization is not None:
        require_bitsandbytes(f"quantization {quantization.format}")
    located = locate(name, pretrained, revision)
    if revision and located.revision is None:
        raise UserError(f"revision {revision} asked of {name}, which is not on the Hub; remove the revision")
    config = at_size(name, located.config, image_size)
    visual, stored = _load_lean(located) if quantization else (_load(located), None)
    visual.eval().requires_grad_(False)
    sha256 = tensors_sha256(visual if stored is None else stored)
    if "image_size" in config:
        set_image_size(visual, image_size)
    if quantization is not None:
        device = device or default_device()
        quantize_tower(visual, quantization, device)
        let_go_of_file(visual)
        visual.to(quantization.dtype)
    return VisionBackbone(
        visual=visual if device is None else visual.to(device),
        config=config,
        preprocess=tower_preprocess(visual, located.preprocess, resize_mode),
        width=token_width(visual),
        source=dict(
            **dict(zip(("name", "pretrained"), local_source(name, pretrained), strict=True)),
            revision=located.revision,
            sha256=sha256,
            quantization=quantization.record() if quantization else None,
            image_size=image_size,
        ),
        license=located.license(),
    )


def tower_config(name: str, pretrained: str | None = None, image_size: int | None = None) -> dict:
    """A `VisionBackbone.config` by what `load_vision` takes; of a Hub repository only it is fetched. UserError as there."""
    return at_size(name, native_config(name, pretrained), image_size)


def _load(located: Located) -> nn.Module:
    """The tower with its weights, or with random ones. OpenCLIP loads both towers from one file; the text tower is
    dropped."""
    if not located.has_weights:
        return build_visual(located.config)
    with _told(located):
        return open_clip.create_model(
            located.model,
            pretrained=located.weights,
            force_quick_gelu=located.config["quick_gelu"],
            require_pretrained=True,
        ).visual


def _load_lean(located: Located) -> tuple[nn.Module, StoredTensors | None]:
    """The same with no more than the file in memory, and the tensors that the tower would hold otherwise."""
    file = weights_file(located.model, located.weights) if located.has_weights else None
    if file is None:
        return _load(located), None
    buffers = non_persistent_buffers(located.config)
    with torch.device("meta"):
        visual = build_visual(located.config)
    with _told(located):
        stored = fill_from_file(visual, file)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(visual.get_submodule(owner), leaf, buffer)
    return visual, stored


@contextmanager
def _told(located: Located) -> Iterator[None]:
    """Turn what goes wrong with a file into one line."""
    file = located.weights or located.model
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} holds more than plain weights, or is damaged; save it again") from error
    except UNLOADABLE as error:
        reraise_machine_error(error)
        raise UserError(
            f"cannot load {file} as {located.model}: {error_message(error)}; "
            "check that weights and architecture belong together"
        ) from error
