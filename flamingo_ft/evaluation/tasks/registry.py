"""The tasks by name."""

from __future__ import annotations

import difflib

from flamingo_ft.errors import UserError

from . import (
    classification,
    coco_captions,
    flickr30k,
    gqa,
    hateful_memes,
    imagenet,
    mme,
    ok_vqa,
    pope,
    scienceqa,
    textvqa,
    vizwiz,
    vqav2,
)
from .task import Task

_MODULES = (
    coco_captions,
    flickr30k,
    vqav2,
    ok_vqa,
    textvqa,
    vizwiz,
    gqa,
    pope,
    scienceqa,
    hateful_memes,
    imagenet,
    mme,
    classification,
)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}


def find_task(name: str) -> Task:
    """Return the task of a name. Raises UserError, with the nearest names, for an unknown one."""
    if name in TASKS:
        return TASKS[name]
    nearest = difflib.get_close_matches(name.lower(), TASKS, n=3)
    raise UserError(f"task: got {name!r}; use one of {', '.join(nearest or TASKS)}")
