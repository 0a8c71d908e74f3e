"""OpenCLIP vision towers: load one, rebuild one from its configuration, and turn images into spatial tokens.

Shapes: N images, H and W pixels, V spatial tokens (patches), D token width.
"""

from __future__ import annotations

import difflib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from flamingo_ft.backbones.device import default_device
from flamingo_ft.backbones.identity import tensors_sha256
from flamingo_ft.backbones.image_size import refuse_part_of_a_patch, set_image_size
from flamingo_ft.backbones.quantization import Quantization, require_bitsandbytes
from flamingo_ft.backbones.quantized_tower import quantize_tower
from flamingo_ft.backbones.tower_weights import StoredTensors, fill_from_file, let_go_of_file, weights_file
from flamingo_ft.errors import UserError

NANO_FOLDER = Path(__file__).parent / "nano" / "vision"
CONFIG_FILE = "open_clip_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")  # what open_clip looks for in a local-dir

# What open_clip, torch and safetensors raise for files that are missing, broken or of another architecture.
UNLOADABLE = (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, SafetensorError)

# What torch and timm raise for images of a size that a tower is not made for.
UNSIZEABLE = (RuntimeError, AssertionError, ValueError, TypeError, IndexError, AttributeError)


@dataclass(frozen=True)
class VisionBackbone:
    """A vision tower and what is needed to rebuild it, to feed it and to recognise it.

    visual: OpenCLIP's `.visual`, frozen and in eval mode.
    config: JSON-able {"embed_dim", "vision_cfg", "quick_gelu"}, for `build_visual`; "image_size" where it is another
        than the architecture's.
    preprocess: JSON-able fields of OpenCLIP's PreprocessCfg, for `image_transform`.
    width: D, the width of its spatial tokens.
    source: {"name", "pretrained", "revision", "sha256", "quantization", "image_size"}; the digest is of the tower's
        tensors before they were brought to another image size or quantized.
    """

    visual: nn.Module
    config: dict
    preprocess: dict
    width: int
    source: dict


@dataclass(frozen=True)
class _Located:
    """A tower found but not loaded yet. `model` and `weights` are what `open_clip.create_model` takes."""

    model: str
    config: dict
    weights: str | None = None
    has_weights: bool = True
    preprocess: dict = field(default_factory=dict)
    revision: str | None = None


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
    located = _locate(name, pretrained, revision)
    if revision and located.revision is None:
        raise UserError(f"revision {revision} asked of {name}, which is not on the Hub; remove the revision")
    config = _at_size(name, located.config, image_size)
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
            name=name,
            pretrained=pretrained,
            revision=located.revision,
            sha256=sha256,
            quantization=quantization.record() if quantization else None,
            image_size=image_size,
        ),
    )


def tower_config(name: str, pretrained: str | None = None, image_size: int | None = None) -> dict:
    """A `VisionBackbone.config` by what `load_vision` takes; of a Hub repository only it is fetched. UserError as there."""
    return _at_size(name, _native_config(name, pretrained), image_size)


def _native_config(name: str, pretrained: str | None) -> dict:
    if not name.startswith("hf-hub:"):
        architecture = name.replace("/", "-")
        if pretrained and architecture in open_clip.list_models():
            _refuse_unknown_tag(architecture, pretrained)
        return _locate(name, None, None).config
    file = _download(name.removeprefix("hf-hub:"), CONFIG_FILE, None)
    return _read_config(file)[0]


def build_visual(config: dict) -> nn.Module:
    """Build the tower of a `VisionBackbone.config` with random weights; nothing is downloaded.

    Under `torch.device("meta")` it costs no memory. A state dict then fills every parameter and persistent
    buffer; the rest (tables of rotary or relative positions) comes from `non_persistent_buffers(config)`.
    """
    # The public constructor wants a text tower too: the smallest one, dropped at once.
    text = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=8, heads=1, layers=1)
    vision_cfg = {**config["vision_cfg"], "timm_model_pretrained": False}  # else ImageNet weights are fetched
    quick_gelu = config.get("quick_gelu", False)
    visual = open_clip.CLIP(config["embed_dim"], vision_cfg, text, quick_gelu=quick_gelu).visual
    if config.get("image_size"):
        set_image_size(visual, config["image_size"])
    return visual


def _at_size(name: str, config: dict, image_size: int | None) -> dict:
    """``config`` with another image size, after a try on the meta device. UserError where the tower cannot take it."""
    native = config["vision_cfg"].get("image_size", 224)
    if image_size is None or native in (image_size, [image_size, image_size]):
        return config
    sized = {**config, "image_size": image_size}
    try:
        with torch.device("meta"):
            refuse_part_of_a_patch(build_visual(config), name, image_size)
            spatial_tokens(build_visual(sized), torch.zeros(1, 3, image_size, image_size))
    except UNSIZEABLE as error:
        raise UserError(
            f"vision tower {name} is made for images of {native} pixels and cannot take {image_size} "
            f"({_one_line(error)}); leave image_size out, or choose a ViT"
        ) from error
    return sized


def non_persistent_buffers(config: dict) -> dict[str, Tensor]:
    """The buffers of `build_visual(config)` that its state dict leaves out, on CPU, by name; {} for most.

    Only some timm trunks have any (EVA, PE-Core, Swin). Those towers are built once in memory and dropped.
    """
    with torch.device("meta"):
        names = _unstored_buffers(build_visual(config))
    if not names:
        return {}
    with torch.device("cpu"):  # the caller may be inside a meta context
        visual = build_visual(config)
    return {name: visual.get_buffer(name) for name in names}


def spatial_tokens(visual: nn.Module, images: Tensor) -> Tensor:
    """Tokens of the last block, one per patch, before the tower's final norm: (N, 3, H, W) -> (N, V, D).

    Class and register tokens are dropped; the maps of convolutional towers become tokens row by row. For CLIP
    ViTs these are the tokens OpenFlamingo saw. The tower is frozen, and in eval mode whatever mode it is in, so
    patch dropout, stochastic depth and batch statistics play no part; there is a gradient only where LoRA was put
    into it and trains. Images are cast to the dtype of its first convolution.

    Raises UserError when the tower has no spatial tokens.
    """
    trunk = getattr(visual, "trunk", visual)
    if not hasattr(visual, "forward_intermediates") or not hasattr(trunk, "forward_intermediates"):
        raise UserError(
            f"vision tower {type(trunk).__name__} has no spatial tokens (no forward_intermediates); "
            "choose an OpenCLIP architecture such as ViT-L-14"
        )
    with torch.set_grad_enabled(torch.is_grad_enabled() and _has_trained_lora(visual)), _eval_mode(visual):
        outputs = visual.forward_intermediates(
            _as_input(visual, images), indices=1, normalize_intermediates=False, intermediates_only=True
        )
    return outputs["image_intermediates"][-1].flatten(2).transpose(1, 2)


def layers_after_tokens(visual: nn.Module) -> set[nn.Module]:
    """The modules of a tower that `spatial_tokens` does not call: poolers and heads."""
    called: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda module, _: called.add(module)) for m in visual.modules()]
    size = visual.image_size if isinstance(visual.image_size, (tuple, list)) else (visual.image_size,) * 2
    try:
        spatial_tokens(visual, torch.zeros(1, 3, *size, device=next(visual.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return set(visual.modules()) - called


def token_width(visual: nn.Module) -> int:
    """D, the width of the tower's spatial tokens. Raises UserError for what is no OpenCLIP tower."""
    if isinstance(visual, VisionTransformer):
        return visual.transformer.width
    if isinstance(visual, TimmModel):
        return visual.trunk.feature_info[-1]["num_chs"]
    if isinstance(visual, ModifiedResNet):
        return visual.layer4[-1].conv3.out_channels
    raise UserError(
        f"the token width of a {type(visual).__name__} is not known; pass an OpenCLIP tower (model.visual)"
    )


def image_transform(preprocess: dict) -> Callable[[Image.Image], Tensor]:
    """OpenCLIP's inference transform for a `VisionBackbone.preprocess`: image -> (3, H, W), normalised."""
    return image_transform_v2(PreprocessCfg(**preprocess), is_train=False)


def _has_trained_lora(module: nn.Module) -> bool:
    return any(parameter.requires_grad and ".lora_" in name for name, parameter in module.named_parameters())


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Put every submodule but LoRA's own in eval mode, and back in its own mode afterwards."""
    training = [part for name, part in module.named_modules() if part.training and ".lora_" not in name]
    for submodule in training:
        submodule.training = False
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


def _unstored_buffers(visual: nn.Module) -> list[str]:
    stored = visual.state_dict().keys()
    return [name for name, _ in visual.named_buffers() if name not in stored]


def _as_input(visual: nn.Module, images: Tensor) -> Tensor:
    convolutions = (module for module in visual.modules() if isinstance(module, nn.Conv2d))
    first = next(convolutions, None)
    return images if first is None else images.to(first.weight.dtype)


def _locate(name: str, pretrained: str | None, revision: str | None) -> _Located:
    architecture = name.replace("/", "-")  # "ViT-B/32", as OpenCLIP reads it
    if architecture in open_clip.list_models():
        return _locate_architecture(architecture, pretrained, revision)
    if pretrained:
        raise UserError(f"pretrained {pretrained} goes with an OpenCLIP architecture, not {name}; remove it")
    if name == "nano":
        return _locate_folder(NANO_FOLDER)
    if name.startswith("hf-hub:"):
        return _locate_on_hub(name.removeprefix("hf-hub:"), revision)
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if folder.is_dir():
        return _locate_folder(folder)
    nearest = difflib.get_close_matches(architecture, ["nano", *open_clip.list_models()], n=3, cutoff=0.4)
    raise UserError(
        f"vision tower {name} is no folder, no hf-hub:ORG/NAME and no OpenCLIP architecture; nearest known: "
        + (", ".join(nearest) or "none, see open_clip.list_models()")
    )


def _locate_architecture(name: str, pretrained: str | None, revision: str | None) -> _Located:
    model_cfg = open_clip.get_model_config(name)
    if not pretrained:
        return _Located(name, _tower_config(model_cfg), has_weights=False)
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if tag:
        repository, file = os.path.split(tag["hf_hub"])
        weights = _download(repository, file or None, revision)
        model_cfg["quick_gelu"] = model_cfg.get("quick_gelu", False) or tag.get("quick_gelu", False)
        return _Located(name, _tower_config(model_cfg), str(weights), True, tag, _commit(weights))
    _refuse_unknown_tag(name, pretrained)
    return _Located(name, _tower_config(model_cfg), pretrained)


def _refuse_unknown_tag(name: str, pretrained: str) -> None:
    if not open_clip.get_pretrained_cfg(name, pretrained) and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"{name} has no pretrained tag {pretrained}, nor is that a file; "
            f"tags of {name}: {tags}; or give a file with weights"
        )


def _locate_on_hub(repository: str, revision: str | None) -> _Located:
    config_file = _download(repository, CONFIG_FILE, revision)
    _download(repository, None, _commit(config_file))
    return _locate_folder(config_file.parent, _commit(config_file))


def _locate_folder(folder: Path, revision: str | None = None) -> _Located:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{folder} has no {CONFIG_FILE}; give a folder in OpenCLIP's local-dir format")
    config, preprocess = _read_config(file)
    if not any(entry.suffix in WEIGHT_SUFFIXES for entry in folder.iterdir()):
        raise UserError(f"{folder} holds no weights; add open_clip_model.safetensors")
    return _Located(f"local-dir:{folder}", config, preprocess=preprocess, revision=revision)


def _read_config(file: Path) -> tuple[dict, dict]:
    """The tower's configuration, and what the file says of the image transform."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        return _tower_config(contents["model_cfg"]), contents.get("preprocess_cfg", {})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no OpenCLIP configuration ({_one_line(error)}); correct it") from error


def _download(repository: str, file: str | None, revision: str | None) -> Path:
    """Fetch one file of a Hub repository (None: its weights) into the cache, unless it is there."""
    try:
        return Path(download_pretrained_from_hf(repository, filename=file, revision=revision))
    except FileNotFoundError as error:  # open_clip turns every failure into this one
        raise UserError(
            f"{_one_line(error)} (revision {revision or 'main'}); "
            "check the name, the revision and the network, or give a folder"
        ) from error


def _commit(file: Path) -> str | None:
    """The commit in a path of the Hugging Face cache, .../snapshots/<commit>/...; None elsewhere."""
    found = re.search(r".*/snapshots/([^/]+)/", file.as_posix())
    return found.group(1) if found else None


def _load(located: _Located) -> nn.Module:
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


def _load_lean(located: _Located) -> tuple[nn.Module, StoredTensors | None]:
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
def _told(located: _Located) -> Iterator[None]:
    """Turn what goes wrong with a file into one line."""
    file = located.weights or located.model
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} holds more than plain weights, or is damaged; save it again") from error
    except UNLOADABLE as error:
        raise UserError(
            f"cannot load {file} as {located.model}: {_one_line(error)}; "
            "check that weights and architecture belong together"
        ) from error


def _tower_config(model_cfg: dict) -> dict:
    return {
        "embed_dim": model_cfg["embed_dim"],
        "vision_cfg": model_cfg["vision_cfg"],
        "quick_gelu": bool(model_cfg.get("quick_gelu", False)),
    }


def tower_preprocess(visual: nn.Module, overrides: dict, resize_mode: str | None = None) -> dict:
    """OpenCLIP's rule: its defaults, then the overrides, then always the tower's image size; and what is wished for."""
    wanted = {"size": visual.image_size, "resize_mode": resize_mode}
    fields = merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), overrides), wanted)
    return json.loads(json.dumps(fields))  # tuples become lists, as they will be once stored


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
