"""Find a timm model: the Hub repository of a name, and what timm's config.json says about the tower."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import timm
from timm.models import (
    PretrainedCfg,
    get_deprecated_models,
    get_pretrained_cfg,
    is_model_pretrained,
    split_model_name_tag,
)

from flamingo_ft.backbones.compat import load_timm_config
from flamingo_ft.backbones.timm_tower import TIMM_KEY
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.hub.names import TIMM

# How timm's evaluation transform makes images square, in OpenCLIP's words.
RESIZE_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}
INTERPOLATIONS = ("bicubic", "bilinear")  # those of OpenCLIP; no model of timm 1.0 has another

# Arguments that timm itself adds only while it loads pretrained weights; a rebuilt tower needs them too.
PRETRAINED_ARGS = {"fbnetc_100": {"bn_eps": 1e-3}}


# --- Names


@dataclass(frozen=True)
class TimmName:
    """A timm model with the tag of its weights: name ``timm/ARCHITECTURE.TAG``, and its Hub repository."""

    name: str
    repository: str


def timm_name(name: str) -> TimmName:
    """Return the full name and the repository of ``timm/ARCHITECTURE[.TAG]``; timm's default tag without one.

    Raises UserError for a name that timm does not have, and for one without weights on the Hub.
    """
    model = name.removeprefix(TIMM)
    architecture, tag = split_model_name_tag(model)
    if architecture not in timm.list_models():
        raise UserError(f"vision tower {name}: timm has no model {architecture}; {_nearest(model)}")
    if not is_model_pretrained(model):
        raise _no_weights(name, architecture, tag)
    pretrained = get_pretrained_cfg(model)
    if pretrained is None or not pretrained.hf_hub_id:
        raise UserError(
            f"vision tower {name}: timm's weights are not on the Hub; choose another model, or give a folder "
            "with its config.json and weights (timm.models.save_for_hf writes both)"
        )
    tagged = f"{architecture}.{pretrained.tag}" if pretrained.tag else architecture
    return TimmName(f"{TIMM}{tagged}", pretrained.hf_hub_id)


def _no_weights(name: str, architecture: str, tag: str) -> UserError:
    tags = [split_model_name_tag(other)[1] for other in timm.list_pretrained(architecture)]
    if not tags:
        return UserError(f"vision tower {name} has no pretrained weights in timm; {_nearest(architecture)}")
    return UserError(
        f"vision tower {name}: no weights with tag {tag}; tags of {architecture}: {', '.join(tags)}"
    )


def _nearest(model: str) -> str:
    """Return a suggestion: the name that replaced this one, or the most similar ones with weights."""
    renamed = get_deprecated_models().get(model)
    known = timm.list_models(pretrained=True, include_tags="." in model)
    nearest = [renamed] if renamed else difflib.get_close_matches(model, known, n=3, cutoff=0.5)
    names = ", ".join(f"{TIMM}{one}" for one in nearest)
    return f"nearest known: {names or 'none, see timm.list_pretrained()'}"


# --- Configuration


def read_timm_config(file: Path) -> tuple[dict, dict]:
    """Return a tower's configuration and the fields of OpenCLIP's PreprocessCfg from timm's config.json.

    timm's crop_pct has no counterpart in OpenCLIP and is ignored: nothing is cut off the shorter side.
    Raises UserError for another or damaged file, and for a model that timm does not have.
    """
    try:
        values, architecture, model_args = load_timm_config(file.parent)
        pretrained = PretrainedCfg(**values)
        channels, height, width = pretrained.input_size
        resize_mode = RESIZE_MODES[pretrained.crop_mode]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a timm configuration ({error_message(error)}); correct it") from error
    if not timm.is_model(architecture):
        raise UserError(f"{file}: timm {timm.__version__} has no architecture {architecture}; upgrade timm")
    if channels != 3:
        raise UserError(f"{file}: the model takes images of {channels} channels; choose one for RGB images")
    config = {
        "vision_cfg": {
            "timm_model_name": architecture,
            "image_size": height if height == width else [height, width],
        },
        TIMM_KEY: {
            "model_args": PRETRAINED_ARGS.get(architecture, {}) | model_args,
            # What the shape of the model depends on; the rest is about weights, images and labels.
            "pretrained_cfg": {
                "input_size": [channels, height, width],
                "fixed_input_size": pretrained.fixed_input_size,
                "num_classes": pretrained.num_classes,
            },
        },
    }
    preprocess = {
        "mean": list(pretrained.mean),
        "std": list(pretrained.std),
        "interpolation": pretrained.interpolation if pretrained.interpolation in INTERPOLATIONS else None,
        "resize_mode": resize_mode,
    }
    return config, preprocess
