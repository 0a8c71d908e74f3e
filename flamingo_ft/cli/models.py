"""Commands that write models: `merge`, `convert` and `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flamingo_ft.cli.arguments import (
    AccuracyMargin,
    Adapter,
    LogitTolerance,
    LossMargin,
    MergeBase,
    MergedDtype,
    MergedQuantization,
    MergeSamples,
    Out,
    Pretrained,
    StartPath,
    WithCode,
)
from flamingo_ft.errors import UserError


def merge(
    adapter: Adapter,
    out: Out,
    base: MergeBase = "bf16",
    dtype: MergedDtype = "bf16",
    quantization: MergedQuantization = "none",
    tolerance: LogitTolerance = None,
    samples: MergeSamples = 64,
    margin: LossMargin = 0.5,
    accuracy_margin: AccuracyMargin = 0.1,
    start: StartPath = None,
    with_code: WithCode = False,
) -> None:
    """Merge an adapter into its base: one standalone model.

    Every written tensor is verified. Loss and accuracy are compared with the adapter's on held-out samples of
    the run, and a model that is worse by more than the margins is refused.
    """
    from flamingo_ft.adapters.trained_on import generate_options
    from flamingo_ft.backbones.precision import DTYPES
    from flamingo_ft.backbones.quantization import Quantization
    from flamingo_ft.cli.metrics_table import print_merge_report
    from flamingo_ft.evaluation.merging import merge_adapter

    report = merge_adapter(
        adapter,
        out,
        base=base,
        dtype=DTYPES[dtype],
        quantization=None if quantization == "none" else Quantization(quantization),
        tolerance=tolerance,
        samples=samples,
        margin=margin,
        accuracy_margin=accuracy_margin,
        start=start,
        with_code=with_code,
    )
    print_merge_report(report)
    typer.echo(f"merged model in {out}; try it: flamingo-ft generate {out} {generate_options(out)}")


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A checkpoint, an adapter or a model: a path or org/name on the Hub."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder or file to write; it must not exist.")],
    to: Annotated[
        Literal["auto", "adapter", "model", "open_flamingo", "otter"],
        typer.Option(help="What to write. auto: an adapter, or a model if the backbones were changed."),
    ] = "auto",
    language: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The language model that SRC was trained with, as in a recipe."),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The tower that SRC was trained with, by default OpenAI's ViT-L-14."
        ),
    ] = None,
    pretrained: Pretrained = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The checkpoint that SRC starts from, or where it is now, if it was moved.",
        ),
    ] = None,
    lora_alpha: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="lora_alpha of a checkpoint that does not record it."),
    ] = None,
) -> None:
    """Import an OpenFlamingo, Otter or Multimodal-GPT checkpoint, or export to OpenFlamingo or Otter."""
    from flamingo_ft import convert as converting

    if to in ("open_flamingo", "otter"):
        options = {
            "--language": language,
            "--vision": vision,
            "--pretrained": pretrained,
            "--lora-alpha": lora_alpha,
        }
        if unused := [option for option, value in options.items() if value is not None]:
            raise UserError(f"{unused[0]}: not used with --to {to}, which writes what SRC records; remove it")
        export = converting.export_otter if to == "otter" else converting.export_open_flamingo
        report = export(source, out, start=start)
    else:
        known = converting.Backbones(language, vision, pretrained)
        report = converting.import_checkpoint(source, out, known, to=to, start=start, lora_alpha=lora_alpha)
    for line in (f"{report.source} -> {report.result}", *report.lines):
        typer.echo(line)
    typer.echo(f"{report.result} in {report.out}")


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a run, an adapter or a merged model.")
    ],
    repository: Annotated[
        str, typer.Argument(metavar="REPO", help="org/name; the repository is created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Create repositories as private ones.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to push to, by default main.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge the adapter and push the whole model.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Use this base, which is on the Hub already, instead of creating REPO-base."
        ),
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="License in the card, such as apache-2.0.")
    ] = None,
    start: StartPath = None,
) -> None:
    """Push an adapter and its base, or a merged model, to the Hugging Face Hub."""
    from flamingo_ft import publish
    from flamingo_ft.cli.output import log

    pushed = publish.push(
        folder,
        repository,
        private=private,
        revision=revision,
        merged=merged,
        base=base,
        license=license_,
        start=start,
        log=log,
    )
    base_line = f", its base in {pushed.base}" if pushed.base else ""
    typer.echo(f"{pushed.repository} is at {pushed.url}{base_line}")
