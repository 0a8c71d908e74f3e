"""Whether the images of examples are there."""

from __future__ import annotations

import os
from collections.abc import Iterable

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import plural

from .task import Example


def check_images(examples: Iterable[Example]) -> None:
    """Raise UserError, naming the first, if images of the examples are missing."""
    paths: dict[str, str] = {}
    for example in examples:
        for path in example.images:
            paths.setdefault(path, example.where)
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"{paths[missing[0]]}: no image {missing[0]}; {len(missing):,} of {plural(len(paths), 'image')} "
            f"{verb} missing, unpack the published images there"
        )
