"""Commands that judge a model or open it to others: `eval`, `serve` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flamingo_ft.cli.arguments import Adapter, AnswerQuantization, MaxNewTokens


def evaluate(
    adapter: Adapter,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Keys of data.eval and eval to set, such as eval.max_samples=100."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Samples to evaluate on instead of the recipe's, as data.eval.0; set "
            "data.eval.0.image_root=FOLDER for their images.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="One more metric: a name of eval.metrics, or your own as FILE.py:function; repeat it for "
            "several.",
        ),
    ] = None,
) -> None:
    """Evaluate a run's adapter, a converted adapter or a merged model on held-out samples."""
    from flamingo_ft.cli.metrics_table import print_metrics
    from flamingo_ft.cli.output import log
    from flamingo_ft.evaluation.evaluate import evaluate_adapter

    file = None if data is None else str(data)
    print_metrics(evaluate_adapter(adapter, file, overrides or (), log, metric or ()))


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
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API until interrupted."""
    from flamingo_ft.inference import server

    server.serve(
        model, host, port, allowed_media=allowed_media, image_urls=image_urls, max_body_mib=max_body_mib
    )


def demo(
    model: Adapter,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Port to listen on.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Let Gradio make a link that anyone on the internet can open.")
    ] = False,
    quantization: AnswerQuantization = None,
    max_new_tokens: MaxNewTokens = 256,
) -> None:
    """Show a web page to try a model: images, streamed answers, where it looks, the adapter on and off."""
    from flamingo_ft.inference import demo

    demo.demo(model, host, port, share=share, quantization=quantization, max_new_tokens=max_new_tokens)
