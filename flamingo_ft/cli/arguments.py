"""Arguments that several commands share, and the options of `merge`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flamingo_ft.errors import UserError

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
ImageRoot = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="With --data: the folder of its images.", exists=True, file_okay=False
    ),
]
BoxUnit = Annotated[
    Literal["pixels", "relative"],
    typer.Option(help="With --data: unit of its boxes, as box_unit of a source in a recipe."),
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

# --- how answers are decoded, under transformers' names ---

MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Maximum length of an answer in tokens.")]
MinNewTokens = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Minimum length of an answer in tokens.")
]
NumBeams = Annotated[int, typer.Option(min=1, metavar="N", help="Beam search with N beams.")]
LengthPenalty = Annotated[
    float | None, typer.Option(metavar="X", help="Of beam search: above 0 prefers longer answers.")
]
Temperature = Annotated[
    float | None, typer.Option(metavar="X", help="Sample, with this temperature; 0 decodes greedily.")
]
TopP = Annotated[
    float | None,
    typer.Option(metavar="X", help="Sample from the likeliest tokens of this total probability."),
]
TopK = Annotated[int | None, typer.Option(metavar="N", help="Sample from the N likeliest tokens.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option(metavar="X", help="Above 1: make tokens that came already less likely.")
]
NoRepeatNgramSize = Annotated[
    int | None, typer.Option(metavar="N", help="Do not write the same N tokens in a row twice.")
]
StopString = Annotated[
    list[str] | None,
    typer.Option("--stop-string", metavar="TEXT", help="End an answer before this text; repeatable."),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Seed of sampling; by default, answers vary, with --data not.")
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message before the dialogue.")]
AnswerQuantization = Annotated[
    Literal["none", "int8", "nf4", "fp4"] | None,
    typer.Option(help="Load the frozen backbones in this format; by default as in training."),
]
AnswerDtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(help="Compute in this dtype; auto: bf16 where the machine has instructions for it."),
]


def refuse_options(options: Mapping[str, Any], reason: str) -> None:
    """Raise UserError for the first option that is set although it has no effect."""
    for name, value in options.items():
        if value:
            raise UserError(f"{name}: {reason}")
