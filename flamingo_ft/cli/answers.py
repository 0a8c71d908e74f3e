"""Commands that judge a model or open it to others: `eval`, `serve` and `demo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flamingo_ft.cli.arguments import (
    Adapter,
    AnswerDtype,
    AnswerQuantization,
    BoxUnit,
    ImageRoot,
    MaxNewTokens,
    StartPath,
    refuse_options,
)
from flamingo_ft.errors import UserError


def evaluate(
    adapter: Adapter,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK] [KEY=VALUE]...",
            help="A standard task, such as vqav2, and keys of data.eval and eval to set, such as "
            "eval.max_samples=100.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="Samples to evaluate on instead of the recipe's: a file, or a folder of images as for "
            "training; of a task, the folder of its published files.",
            exists=True,
        ),
    ] = None,
    image_root: ImageRoot = None,
    box_unit: BoxUnit = "pixels",
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="One more metric: a name of eval.metrics, or your own as FILE.py:function; repeat it for "
            "several.",
        ),
    ] = None,
    shots: Annotated[
        list[int] | None,
        typer.Option(min=0, metavar="N", help="Of a task: demonstrations before each question; repeatable."),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, metavar="N", help="Of a task: seed of the demonstrations; repeatable."),
    ] = None,
    demonstrations: Annotated[
        Literal["random", "rices"],
        typer.Option(help="Of a task: drawn at random, or the nearest images by the tower's features."),
    ] = "random",
    form: Annotated[
        Literal["chunks", "chat"],
        typer.Option(help="Of a task: prompts as OpenFlamingo is evaluated with, or turns of a chat."),
    ] = "chunks",
    controls: Annotated[
        bool | None,
        typer.Option(
            "--controls/--no-controls",
            help="Ask again with another image and with a gray one; of a task also with shuffled "
            "demonstrations. Default: for tasks.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write scores, answers and a page to look at them here."),
    ] = None,
    quantization: AnswerQuantization = None,
    dtype: AnswerDtype = "auto",
    start: StartPath = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VARIANT",
            help="Ask a variant the same questions: base, the model without its adapter; none, int8, nf4 or "
            "fp4, the model in that format; or another adapter or merged model. Repeat it for several.",
        ),
    ] = None,
    card: Annotated[
        bool,
        typer.Option("--card", help="Write the scores, with their intervals, into the model's README.md."),
    ] = False,
) -> None:
    """Evaluate an adapter or a merged model on held-out samples, or on a standard task; compare variants."""
    first, *rest = settings or [""]
    of_data = {"--image-root": image_root, "--box-unit": box_unit != "pixels"}
    if first and "=" not in first:
        refuse_options(of_data, "not used with a task, whose files name their images; remove it")
        _evaluate_task(
            adapter, first, rest, data, metric or (), shots or (0,), seed or (0,), demonstrations, form,
            controls=controls is not False, out=out, start=start, quantization=quantization, dtype=dtype,
            compare=compare or (), card=card,
        )  # fmt: skip
        return
    unused = {"--shots": shots, "--seed": seed, "--demonstrations": demonstrations != "random",
              "--form": form != "chunks"}  # fmt: skip
    refuse_options(unused, "only used with a task, such as vqav2; name one, or remove it")
    if data is None:
        refuse_options(of_data, "only used with --data; add it, or remove this")
    from flamingo_ft.cli.metrics_table import print_metrics
    from flamingo_ft.cli.models_table import print_variants
    from flamingo_ft.cli.output import log
    from flamingo_ft.evaluation.evaluate import evaluate_adapter

    record = evaluate_adapter(
        adapter, data, settings or (), log, metric or (),
        image_root=image_root, box_unit=box_unit, start=start, quantization=quantization, dtype=dtype,
        controls=bool(controls), out=out, compare=compare or (), card=card,
    )  # fmt: skip
    if compare:
        print_variants(record["variants"])
    else:
        print_metrics(record)


def _evaluate_task(
    adapter: str,
    task: str,
    overrides: list[str],
    data: Path | None,
    metrics: Sequence[str],
    shots: Sequence[int],
    seeds: Sequence[int],
    demonstrations: Literal["random", "rices"],
    form: Literal["chunks", "chat"],
    **options: Any,
) -> None:
    from flamingo_ft.cli.models_table import print_variants
    from flamingo_ft.cli.output import log
    from flamingo_ft.cli.task_table import print_task
    from flamingo_ft.evaluation.tasks import find_task
    from flamingo_ft.evaluation.tasks.evaluate import evaluate_task, of_shots
    from flamingo_ft.evaluation.tasks.run import Protocol
    from flamingo_ft.evaluation.tasks.settings import task_settings

    files = ", ".join(find_task(task).files)
    if data is None:
        raise UserError(f"--data: missing; name the folder with {files}")
    settings = task_settings(overrides)
    protocol = Protocol(choice=demonstrations, form=form, max_samples=settings.max_samples)
    record = evaluate_task(
        adapter, task, data, protocol, shots=shots, seeds=seeds, metrics=metrics,
        batch_size=settings.batch_size, log=log, **options,
    )  # fmt: skip
    print_task(record)
    if options["compare"]:
        for count in dict.fromkeys(shots):
            typer.echo(f"\n{count} shots, seed {seeds[0]}")
            print_variants(of_shots(record, count))


def serve(
    model: Adapter,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Port to listen on.")] = 8000,
    allowed_media: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder whose image files requests may refer to (file:///...). By default none.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    image_urls: Annotated[
        Literal["public", "any", "none"],
        typer.Option(help="Which http(s) image URLs to fetch: public addresses only, any, or none."),
    ] = "public",
    max_body_mib: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum size of a request in MiB.")
    ] = 64,
    quantization: AnswerQuantization = None,
    dtype: AnswerDtype = "auto",
    start: StartPath = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API until interrupted."""
    from flamingo_ft.inference import server

    server.serve(
        model, host, port, allowed_media=allowed_media, image_urls=image_urls, max_body_mib=max_body_mib,
        start=start, quantization=quantization, dtype=dtype,
    )  # fmt: skip


def demo(
    model: Adapter,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Port to listen on.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Let Gradio make a link that anyone on the internet can open.")
    ] = False,
    quantization: AnswerQuantization = None,
    dtype: AnswerDtype = "auto",
    start: StartPath = None,
    max_new_tokens: MaxNewTokens = 256,
) -> None:
    """Show a web page to try a model: images, streamed answers, where it looks, the adapter on and off."""
    from flamingo_ft.inference import demo

    demo.demo(
        model, host, port, share=share, start=start, quantization=quantization, dtype=dtype,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
