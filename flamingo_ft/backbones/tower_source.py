"""Find a vision tower: an OpenCLIP architecture and tag, a timm model, a folder, or a Hub repository."""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import open_clip
import timm

from flamingo_ft.backbones.compat import download_pretrained_from_hf
from flamingo_ft.backbones.provenance import license_in, license_on_hub
from flamingo_ft.backbones.timm_source import read_timm_config, timm_name
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.hub.errors import hub_error
from flamingo_ft.hub.names import (
    LOCAL_DIR,
    NANO,
    ON_HUB,
    TIMM,
    commit_of,
    local_tower,
    local_weights,
    missing_path_message,
)
from flamingo_ft.hub.weight_files import (
    CONFIG_FILE,
    OPEN_CLIP_CONFIG_FILE,
    OPEN_CLIP_SUFFIXES,
    OPEN_CLIP_WEIGHTS,
    SAFETENSORS_FILE,
)

NANO_FOLDER = Path(__file__).parent / "nano" / "vision"


@dataclass(frozen=True)
class TowerSource:
    """Where a tower's configuration and weights are; nothing is loaded yet.

    model, weights: what `open_clip.create_model` takes as model and pretrained; a timm model is always in a
        folder. config: for `build_visual`.
    has_weights: False for random weights. preprocess: fields of OpenCLIP's PreprocessCfg.
    repository, revision: on the Hub. folder: on this machine.
    """

    model: str
    config: dict
    weights: str | None = None
    has_weights: bool = True
    preprocess: dict = field(default_factory=dict)
    revision: str | None = None
    repository: str | None = None
    folder: Path | None = None

    def license(self) -> str | None:
        """Return the license stated on the model card in its folder or its Hub repository."""
        if self.folder is not None:
            return license_in(self.folder.parent if self.folder == NANO_FOLDER else self.folder)
        return None if self.repository is None else license_on_hub(self.repository, self.revision)


# --- Names


def is_architecture(name: str) -> bool:
    """Return whether OpenCLIP has an architecture of this name; "ViT-B/32" is "ViT-B-32" as in OpenCLIP."""
    return _dashed(name) in open_clip.list_models()


def _dashed(name: str) -> str:
    return name.replace("/", "-")


def _has_tag(name: str, pretrained: str) -> bool:
    """Return whether OpenCLIP has weights with this tag for an architecture."""
    return is_architecture(name) and bool(open_clip.get_pretrained_cfg(_dashed(name), pretrained))


def _local_folder(name: str, pretrained: str | None) -> Path | None:
    """Return the folder that a tower's name means; None if it comes from elsewhere."""
    folder = local_tower(name, pretrained)
    if folder is None or (is_architecture(name) and not folder.is_dir()):
        return None
    return folder


def recorded_names(name: str, pretrained: str | None) -> tuple[str, str | None]:
    """Return name and pretrained as recorded with an adapter.

    Folders and files get absolute paths, and a timm model its tag: timm's default may change.
    """
    if name.startswith(TIMM):
        return timm_name(name).name, pretrained
    folder = _local_folder(name, pretrained)
    file = local_weights(pretrained) if pretrained and not _has_tag(name, pretrained) else None
    return (str(folder.absolute()) if folder else name), (str(file.absolute()) if file else pretrained)


def hub_repository(name: str, pretrained: str | None) -> str | None:
    """Return the Hub repository of a tower's weights; None if they come from elsewhere."""
    if name.startswith(ON_HUB):
        return name.removeprefix(ON_HUB)
    if name.startswith(TIMM):
        return timm_name(name).repository
    if not pretrained or not is_architecture(name):
        return None
    tag: dict[str, Any] = open_clip.get_pretrained_cfg(_dashed(name), pretrained)
    return os.path.split(tag.get("hf_hub") or "")[0] or None


# --- Finding


def find_tower(name: str, pretrained: str | None, revision: str | None) -> TowerSource:
    """Find the tower for `load_vision`, and download what is not on this machine. Raises as it does."""
    folder = _local_folder(name, pretrained)
    if folder is None and is_architecture(name):
        return _find_architecture(_dashed(name), pretrained, revision)
    _check_no_pretrained(name, pretrained)
    if name == NANO:
        return _find_in_folder(NANO_FOLDER)
    if name.startswith(ON_HUB):
        return _find_on_hub(name.removeprefix(ON_HUB), revision)
    if name.startswith(TIMM):
        return _find_timm_on_hub(timm_name(name).repository, revision)
    if folder is not None:
        if not folder.is_dir():
            hint = missing_path_message(name.removeprefix(LOCAL_DIR), on_hub=f"{ON_HUB}{name}")
            raise UserError(f"vision tower: {hint}")
        return _find_in_folder(folder)
    raise UserError(
        f"vision tower {name} is not a folder, hf-hub:ORG/NAME, timm/NAME or OpenCLIP architecture; "
        f"nearest known: {', '.join(_nearest(name)) or 'none, see open_clip.list_models()'}"
    )


def _check_no_pretrained(name: str, pretrained: str | None) -> None:
    """Refuse a tag or file with weights for a tower that has its own."""
    if pretrained:
        remedy = f"write {TIMM}NAME.TAG, or remove it" if name.startswith(TIMM) else "remove pretrained"
        raise UserError(f"pretrained {pretrained} needs an OpenCLIP architecture, got {name}; {remedy}")


def _nearest(name: str) -> list[str]:
    if timm.is_model(name):
        return [f"{TIMM}{name}"]
    return difflib.get_close_matches(_dashed(name), [NANO, *open_clip.list_models()], n=3, cutoff=0.4)


def native_tower_config(name: str, pretrained: str | None) -> dict:
    """Return the tower's configuration at its own image size; of a Hub repository, download only that."""
    if pretrained and is_architecture(name):
        _check_tag_or_file(_dashed(name), pretrained)
        return _tower_config(_model_config(_dashed(name)))
    _check_no_pretrained(name, pretrained)
    if name.startswith(ON_HUB):
        return _read_config(_download(name.removeprefix(ON_HUB), OPEN_CLIP_CONFIG_FILE, None))[0]
    if name.startswith(TIMM):
        return read_timm_config(_download(timm_name(name).repository, CONFIG_FILE, None))[0]
    return find_tower(name, None, None).config


def _find_architecture(name: str, pretrained: str | None, revision: str | None) -> TowerSource:
    model_cfg = _model_config(name)
    if not pretrained:
        return TowerSource(name, _tower_config(model_cfg), has_weights=False)
    tag: dict[str, Any] = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        _check_tag_or_file(name, pretrained)
        return TowerSource(name, _tower_config(model_cfg), weights=str(local_weights(pretrained)))
    repository, file = os.path.split(tag["hf_hub"])
    weights = _download(repository, file or None, revision)
    model_cfg["quick_gelu"] = model_cfg.get("quick_gelu", False) or tag.get("quick_gelu", False)
    return TowerSource(
        name,
        _tower_config(model_cfg),
        weights=str(weights),
        preprocess=tag,
        revision=commit_of(weights),
        repository=repository,
    )


def _check_tag_or_file(name: str, pretrained: str) -> None:
    if _has_tag(name, pretrained):
        return
    file = local_weights(pretrained)
    if file is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"{name} has no pretrained tag {pretrained}, nor is that a file; "
            f"tags of {name}: {tags}; or give a file with weights"
        )
    if not file.is_file():
        raise UserError(f"weights of {name}: {missing_path_message(pretrained)}")


def _find_on_hub(repository: str, revision: str | None) -> TowerSource:
    config_file = _download(repository, OPEN_CLIP_CONFIG_FILE, revision)
    commit = commit_of(config_file)
    _download(repository, None, commit)
    tower = _find_in_folder(config_file.parent)
    return replace(tower, revision=commit, repository=repository, folder=None)


def _find_timm_on_hub(repository: str, revision: str | None) -> TowerSource:
    config_file = _download(repository, CONFIG_FILE, revision)
    commit = commit_of(config_file)
    _download(repository, SAFETENSORS_FILE, commit)
    tower = _tower_in(config_file.parent, *read_timm_config(config_file), SAFETENSORS_FILE)
    return replace(tower, revision=commit, repository=repository, folder=None)


def _find_in_folder(folder: Path) -> TowerSource:
    if (folder / OPEN_CLIP_CONFIG_FILE).is_file():
        return _tower_in(folder, *_read_config(folder / OPEN_CLIP_CONFIG_FILE), OPEN_CLIP_WEIGHTS)
    if (folder / CONFIG_FILE).is_file():
        return _tower_in(folder, *read_timm_config(folder / CONFIG_FILE), SAFETENSORS_FILE)
    raise UserError(
        f"{folder} has no {OPEN_CLIP_CONFIG_FILE} and no {CONFIG_FILE} of timm; "
        "give a folder in OpenCLIP's or timm's local-dir format"
    )


def _tower_in(folder: Path, config: dict, preprocess: dict, weights: str) -> TowerSource:
    """Return the tower in ``folder``. weights: the usual name of the file with its weights."""
    if not any(entry.suffix in OPEN_CLIP_SUFFIXES for entry in folder.iterdir()):
        raise UserError(f"{folder} holds no weights; add {weights}")
    return TowerSource(f"{LOCAL_DIR}{folder}", config, preprocess=preprocess, folder=folder)


# --- Files


def _read_config(file: Path) -> tuple[dict, dict]:
    """Read the tower's configuration and the fields of the image transform from open_clip_config.json."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        return _tower_config(contents["model_cfg"]), contents.get("preprocess_cfg", {})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not an OpenCLIP configuration ({error_message(error)}); correct it"
        ) from error


def _model_config(architecture: str) -> dict[str, Any]:
    model_cfg = open_clip.get_model_config(architecture)
    assert model_cfg is not None, architecture  # None only for names that OpenCLIP does not list
    return model_cfg


def _tower_config(model_cfg: dict) -> dict:
    return {
        "embed_dim": model_cfg["embed_dim"],
        "vision_cfg": model_cfg["vision_cfg"],
        "quick_gelu": bool(model_cfg.get("quick_gelu", False)),
    }


def _download(repository: str, file: str | None, revision: str | None) -> Path:
    """Download one file of a Hub repository (None: its weights) into the cache, unless it is there."""
    try:
        return Path(download_pretrained_from_hf(repository, filename=file, revision=revision))
    except FileNotFoundError as error:  # open_clip raises this for every failure
        what = f"{file or 'weights'} of vision tower {repository} (revision {revision or 'main'})"
        raise hub_error(what, error) from None
