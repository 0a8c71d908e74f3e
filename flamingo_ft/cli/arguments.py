"""Arguments that several commands share, and the options of `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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
        metavar="PATH", help="Current path of the checkpoint the adapter was trained from, if it has moved."
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")]
Pretrained = Annotated[str | None, typer.Option(metavar="TAG", help="OpenCLIP's tag of the tower's weights.")]

# --- of `merge` ---

MergeBase = Annotated[
    Literal["bf16", "dequantized"],
    typer.Option(help="Merge into the unquantized weights (bf16), or into the dequantized ones."),
]
MergedDtype = Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="dtype of the merged weights.")]
MergedQuantization = Annotated[
    Literal["none", "int8", "nf4", "fp4"], typer.Option(help="Write the merged model quantized.")
]
LogitTolerance = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="X",
        help="Deprecated: also refuse a model whose logits differ by more, relative to the largest.",
    ),
]
MergeSamples = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Held-out samples that the loss is measured on; answers are generated for at most 32.",
    ),
]
LossMargin = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="X",
        help="Allowed increase of the loss, in nats per token, beyond two standard errors.",
    ),
]
AccuracyMargin = Annotated[
    float,
    typer.Option(
        min=0, max=1, metavar="X", help="Allowed decrease of accuracy, 0..1, beyond two standard errors."
    ),
]
WithCode = Annotated[
    bool,
    typer.Option(
        "--with-code", help="Include the code, for use with transformers where this package is not installed."
    ),
]
