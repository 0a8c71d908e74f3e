"""Jinja templates of the package: reports, model cards and recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape


def load_template(name: str, filters: Mapping[str, Callable] | None = None, **options: Any) -> Template:
    """Load a template by its path in the package, such as ``report/report.html.jinja``.

    Undefined variables raise an error, and HTML pages escape every value.

    Args:
        filters: filters for the template, beside Jinja's own.
        options: further options of ``jinja2.Environment``.
    """
    return _load(name, tuple((filters or {}).items()), tuple(options.items()))


@cache  # a run writes its card and report several times
def _load(
    name: str, filters: tuple[tuple[str, Callable], ...], options: tuple[tuple[str, Any], ...]
) -> Template:
    environment = Environment(
        loader=PackageLoader("flamingo_ft", ""),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html.jinja"]),
        **dict(options),
    )
    environment.filters |= dict(filters)
    return environment.get_template(name)
