"""Where a vision tower comes from: an OpenCLIP architecture and tag, a folder, or a repository on the Hub."""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import open_clip
from open_clip.pretrained import download_pretrained_from_hf

from flamingo_ft.backbones.license import license_in, license_on_hub
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.hub.errors import hub_error
from flamingo_ft.hub.names import (
    LOCAL_DIR,
    NANO,
    ON_HUB,
    commit_of,
    local_tower,
    local_weights,
    missing_path_message,
)
from flamingo_ft.hub.weight_files import OPEN_CLIP_CONFIG_FILE, OPEN_CLIP_SUFFIXES, OPEN_CLIP_WEIGHTS

NANO_FOLDER = Path(__file__).parent / "nano" / "vision"


@dataclass(frozen=True)
class Located:
    """A tower found but not loaded yet. `model` and `weights` are what `open_clip.create_model` takes."""

    model: str
    config: dict
    weights: str | None = None
    has_weights: bool = True
    preprocess: dict = field(default_factory=dict)
    revision: str | None = None
    repository: str | None = None
    folder: Path | None = None

    def license(self) -> str | None:
        """As the model card states it, in its folder or its repository on the Hub."""
        if self.folder is not None:
            return license_in(self.folder.parent if self.folder == NANO_FOLDER else self.folder)
        return None if self.repository is None else license_on_hub(self.repository, self.revision)


def is_architecture(name: str) -> bool:
    """Whether OpenCLIP has an architecture of this name."""
    return name.replace("/", "-") in open_clip.list_models()  # "ViT-B/32", as OpenCLIP reads it


def local_source(name: str, pretrained: str | None) -> tuple[str, str | None]:
    """The same two names, absolute where they are paths: what to record of a tower."""
    folder = _local_folder(name, pretrained)
    file = local_weights(pretrained) if pretrained and not _has_tag(name, pretrained) else None
    return (str(folder.absolute()) if folder else name), (str(file.absolute()) if file else pretrained)


def locate(name: str, pretrained: str | None, revision: str | None) -> Located:
    folder, architecture = _local_folder(name, pretrained), name.replace("/", "-")
    if folder is None and is_architecture(name):
        return _locate_architecture(architecture, pretrained, revision)
    if pretrained:
        raise UserError(f"pretrained {pretrained} goes with an OpenCLIP architecture, not {name}; remove it")
    if name == NANO:
        return _locate_folder(NANO_FOLDER)
    if name.startswith(ON_HUB):
        return _locate_on_hub(name.removeprefix(ON_HUB), revision)
    if folder is not None:
        return _locate_folder(folder, name=name)
    nearest = difflib.get_close_matches(architecture, ["nano", *open_clip.list_models()], n=3, cutoff=0.4)
    raise UserError(
        f"vision tower {name} is no folder, no hf-hub:ORG/NAME and no OpenCLIP architecture; nearest known: "
        + (", ".join(nearest) or "none, see open_clip.list_models()")
    )


def _local_folder(name: str, pretrained: str | None) -> Path | None:
    """The folder that a tower's name stands for; None for one that comes from elsewhere."""
    folder = local_tower(name, pretrained)
    if folder is None or (is_architecture(name) and not folder.is_dir()):
        return None
    return folder


def native_config(name: str, pretrained: str | None) -> dict:
    if pretrained and is_architecture(name):
        architecture = name.replace("/", "-")
        _refuse_unknown_tag(architecture, pretrained)
        return _locate_architecture(architecture, None, None).config
    if not name.startswith(ON_HUB):
        return locate(name, None, None).config
    file = _download(name.removeprefix(ON_HUB), OPEN_CLIP_CONFIG_FILE, None)
    return _read_config(file)[0]


def hub_repository(name: str, pretrained: str | None) -> str | None:
    """The repository on the Hub that a tower's weights come from; None where they come from elsewhere."""
    if name.startswith(ON_HUB):
        return name.removeprefix(ON_HUB)
    architecture = name.replace("/", "-")
    known = pretrained and architecture in open_clip.list_models()
    tag = open_clip.get_pretrained_cfg(architecture, pretrained) if known else {}
    return os.path.split(tag.get("hf_hub") or "")[0] or None


def _locate_architecture(name: str, pretrained: str | None, revision: str | None) -> Located:
    model_cfg = open_clip.get_model_config(name)
    if not pretrained:
        return Located(name, _tower_config(model_cfg), has_weights=False)
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if tag:
        repository, file = os.path.split(tag["hf_hub"])
        weights = _download(repository, file or None, revision)
        model_cfg["quick_gelu"] = model_cfg.get("quick_gelu", False) or tag.get("quick_gelu", False)
        return Located(
            name, _tower_config(model_cfg), str(weights), True, tag, commit_of(weights), repository
        )
    _refuse_unknown_tag(name, pretrained)
    return Located(name, _tower_config(model_cfg), str(local_weights(pretrained)))


def _has_tag(name: str, pretrained: str) -> bool:
    """Whether OpenCLIP has weights of this tag for an architecture."""
    return is_architecture(name) and bool(open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained))


def _refuse_unknown_tag(name: str, pretrained: str) -> None:
    file = None if _has_tag(name, pretrained) else local_weights(pretrained)
    if file is not None and not file.is_file():
        raise UserError(f"weights of {name}: {missing_path_message(pretrained)}")
    if file is None and not _has_tag(name, pretrained):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"{name} has no pretrained tag {pretrained}, nor is that a file; "
            f"tags of {name}: {tags}; or give a file with weights"
        )


def _locate_on_hub(repository: str, revision: str | None) -> Located:
    config_file = _download(repository, OPEN_CLIP_CONFIG_FILE, revision)
    _download(repository, None, commit_of(config_file))
    return replace(
        _locate_folder(config_file.parent, commit_of(config_file)), repository=repository, folder=None
    )


def _locate_folder(folder: Path, revision: str | None = None, name: str | None = None) -> Located:
    """name: what the folder was asked for by, where it may not exist."""
    if name is not None and not folder.is_dir():
        raise UserError(
            f"vision tower: {missing_path_message(name.removeprefix(LOCAL_DIR), on_hub=f'{ON_HUB}{name}')}"
        )
    file = folder / OPEN_CLIP_CONFIG_FILE
    if not file.is_file():
        raise UserError(
            f"{folder} has no {OPEN_CLIP_CONFIG_FILE}; give a folder in OpenCLIP's local-dir format"
        )
    config, preprocess = _read_config(file)
    if not any(entry.suffix in OPEN_CLIP_SUFFIXES for entry in folder.iterdir()):
        raise UserError(f"{folder} holds no weights; add {OPEN_CLIP_WEIGHTS}")
    return Located(f"local-dir:{folder}", config, preprocess=preprocess, revision=revision, folder=folder)


def _read_config(file: Path) -> tuple[dict, dict]:
    """The tower's configuration, and what the file says of the image transform."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        return _tower_config(contents["model_cfg"]), contents.get("preprocess_cfg", {})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no OpenCLIP configuration ({error_message(error)}); correct it"
        ) from error


def _download(repository: str, file: str | None, revision: str | None) -> Path:
    """Fetch one file of a Hub repository (None: its weights) into the cache, unless it is there."""
    try:
        return Path(download_pretrained_from_hf(repository, filename=file, revision=revision))
    except FileNotFoundError as error:  # open_clip turns every failure into this one
        wanted = f"{file or 'weights'} of vision tower {repository} (revision {revision or 'main'})"
        raise hub_error(wanted, error) from None


def _tower_config(model_cfg: dict) -> dict:
    return {
        "embed_dim": model_cfg["embed_dim"],
        "vision_cfg": model_cfg["vision_cfg"],
        "quick_gelu": bool(model_cfg.get("quick_gelu", False)),
    }
