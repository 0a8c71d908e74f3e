"""Arguments that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a packaged recipe.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to set, such as train.max_steps=10."),
]
Adapter = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER", help="Folder of an adapter or a merged model, or org/name[@revision] on the Hub."
    ),
]
StartPath = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="Where the checkpoint that the adapter starts from is now, if it was moved."
    ),
]
