"""Models that are not stored whole: an adapter's folder, or a composition that names its two backbones.

`FlamingoForConditionalGeneration.from_pretrained` takes them too. What puts them together is imported by its name when
it is needed, as it stands on this part of the package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.hub.names import NAME, HubName, check_path_exists
from flamingo_ft.hub.weight_files import ADAPTER_CONFIG, CONFIG_FILE, MODEL_WEIGHTS

from .configuration import FlamingoConfig
from .quantized import WHERE

PUTS_TOGETHER = "flamingo_ft.adapters.composition"
OF_THE_CLIENT = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
)  # options that say how files are fetched


@dataclass(frozen=True)
class ModelFolders:
    """Where the parts of a model lie; one of the two may be missing.

    base: a composition's folder; adapter: an adapter's.
    """

    base: Path | None
    adapter: Path | None


def from_parts(
    name: Any, options: Mapping[str, Any]
) -> PreTrainedModel | tuple[PreTrainedModel, dict] | None:
    """What ``from_pretrained(name, **options)`` gives where that is an adapter or a composition; None elsewhere."""
    parts = find_parts(name, options)
    return None if parts is None else import_module(PUTS_TOGETHER).load_parts(parts, options)


def find_parts(name: Any, options: Mapping[str, Any]) -> ModelFolders | None:
    """The parts that a model consists of; None for a whole one, and for what transformers has to say no to."""
    adapter = (options.get("adapter_kwargs") or {}).get("_adapter_model_path")
    if name is None or (Path(name).is_dir() and not is_partial(Path(name))):
        return None
    if adapter is not None and str(adapter) != str(name):  # an adapter on the Hub, and the base that it names
        of_adapter = {**options, "revision": None, **options["adapter_kwargs"]}
        return ModelFolders(
            _fetch(name if options.get("revision") else _as_recorded(str(name)), options),
            _fetch(adapter, of_adapter),
        )
    check_path_exists(name)
    if not Path(name).is_dir() and _is_merged(name, options):
        return None
    folder = _fetch(name, options)
    if not is_partial(folder):
        return None
    if not (folder / ADAPTER_CONFIG).is_file():
        return ModelFolders(folder, None)
    base = None if Path(name).is_dir() else named_composition(folder)
    return ModelFolders(base and _fetch(base, {**options, "revision": None}), folder)


def _is_merged(name: Any, options: Mapping[str, Any]) -> bool:
    """Whether a repository holds a merged model, by its configuration. UserError where it is another model's."""
    if isinstance(options.get("config"), FlamingoConfig):
        return bool(options["config"].merged)
    where = {key: options[key] for key in WHERE if key in options}
    config, _ = FlamingoConfig.get_config_dict(name, **where)
    if config.get("model_type") != FlamingoConfig.model_type:
        raise UserError(
            f"{name}: holds a {config.get('model_type')} model, no Flamingo; where an adapter names it as its base, load "
            "the adapter's folder itself, or let the adapter name a composition"
        )
    return bool(config.get("merged"))


def is_partial(folder: Path) -> bool:
    """Whether a folder has a Flamingo's configuration, and not the weights of a whole one."""
    return (folder / CONFIG_FILE).is_file() and not any(
        any(folder.glob(weights)) for weights in MODEL_WEIGHTS
    )


def named_composition(adapter: Path) -> str | None:
    """The composition that an adapter names as its base; None where it names its language model alone."""
    texts = ((adapter / file).read_text(encoding="utf-8") for file in (CONFIG_FILE, ADAPTER_CONFIG))
    config, peft = map(json.loads, texts)
    named, revision = peft.get("base_model_name_or_path"), peft.get("revision")
    if named is None or named == ((config.get("backbones") or {}).get("language") or {}).get("name"):
        return None
    return _as_recorded(named, revision)


def _as_recorded(name: str, revision: str | None = None) -> str:
    """A name that an adapter records, as one that means the same beside any folders: with a revision it is the Hub's."""
    found = None if os.path.exists(name) else NAME.fullmatch(name)
    return str(HubName(found["repository"], revision or found["revision"] or "main")) if found else name


def _fetch(name: Any, options: Mapping[str, Any]) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder / (options.get("subfolder") or "")
    if options.get("subfolder"):
        raise UserError(
            f"{name}: parts of a model are looked for at the top of a repository; leave subfolder out"
        )
    given = {key: options[key] for key in OF_THE_CLIENT if options.get(key) is not None}
    revision = options.get("revision")
    return fetch_model(f"{name}@{revision}" if revision else name, **given)
