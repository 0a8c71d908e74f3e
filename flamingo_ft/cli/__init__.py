"""The command line: parse, call, print.

Everything slow is imported inside the verb that needs it, so that help and refusals come at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flamingo_ft.cli.recipes import recipes_app
from flamingo_ft.errors import OutOfMemory, ReportedElsewhere, StoppedBySignal, UserError

if TYPE_CHECKING:
    from flamingo_ft.data import OpenedData

MISTAKE, INTERRUPTED, SIGNALLED = 2, 130, 128  # exit codes; the last plus a signal's number
LONGEST_MESSAGE = 200  # characters
_FILES_OF_THE_USER = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)

app = typer.Typer(
    help="Teach a frozen language model to see, on one GPU or none.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(recipes_app, name="recipes")

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a packaged recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values to change, such as train.max_steps=10."),
]
Adapter = Annotated[
    str,
    typer.Argument(metavar="ADAPTER", help="An adapter's folder, a merged model's, or org/name[@revision]."),
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from flamingo_ft.version import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Move an earlier run in train.output_dir aside.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Resume this run from its last checkpoint; with more steps or epochs, extend it."
        ),
    ] = False,
) -> None:
    """Train the bridge as RECIPE says, evaluate it and save it as an adapter."""
    from flamingo_ft.config import load_recipe
    from flamingo_ft.config.library import find_recipe
    from flamingo_ft.training.output_dir import prepare_output_dir, refuse_lost_run

    path = find_recipe(recipe)
    settings = load_recipe(path, overrides or ())
    folder = settings.train.output_dir
    if overwrite and resume:
        raise UserError(
            "found --overwrite and --resume; one begins anew, the other goes on: give one of them"
        )
    if resume:
        refuse_lost_run(path, settings.train)
    earlier = prepare_output_dir(folder, overwrite=overwrite) if _is_main_process() and not resume else None
    if earlier:
        typer.echo(f"moved the earlier run to {earlier}", err=True)

    from flamingo_ft.training.train import train as run_training

    metrics = run_training(settings, _tell_sources, resume=resume, log=_say)
    if _is_main_process():
        _print_metrics(metrics)
        typer.echo(f"adapter in {folder}; ask it: flamingo-ft generate {folder} --image FILE --prompt TEXT")


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    text_tokens: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Text tokens of the longest sample, if not the data's."),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Images of the sample with most, if not the data's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, sizes in bytes.")] = False,
) -> None:
    """Tell how much memory RECIPE needs, on which GPUs it fits, and what to change; no weights are downloaded."""
    from flamingo_ft.config import load_recipe
    from flamingo_ft.config.library import find_recipe

    settings = load_recipe(find_recipe(recipe), overrides or (), require=("backbones",))

    from flamingo_ft.plan.plan_report import make_plan_report

    _print_plan(make_plan_report(settings, text_tokens, images).record(), as_json)


@app.command()
def check(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder to write, by default runs/check_RECIPE.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Read all data of RECIPE, without weights: what is in it, and every row and image that cannot be used."""
    from flamingo_ft.config import load_recipe
    from flamingo_ft.config.library import find_recipe

    path = find_recipe(recipe)
    settings = load_recipe(path, overrides or (), require=("data", "backbones"))
    folder = out or Path("runs") / f"check_{path.stem}"

    from flamingo_ft.check.check_data import check_data

    found = check_data(settings, path.stem, folder).record()
    _print_findings(found, as_json, folder)
    if found["objection"]:
        raise typer.Exit(_refuse(found["objection"]))


@app.command("eval")
def evaluate(
    adapter: Adapter,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Values of data.eval and eval to change: eval.max_samples=100."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Other samples, as data.eval.0 of the recipe: data.eval.0.image_root=photos is their image folder.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
) -> None:
    """Evaluate a run's adapter, a converted one or a merged model on held-out samples."""
    from flamingo_ft.evaluation.evaluate import evaluate_adapter

    _print_metrics(evaluate_adapter(adapter, None if data is None else str(data), overrides or (), _say))


@app.command()
def generate(
    adapter: Adapter,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to ask about the images.")],
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="An image; once per image, in order.", exists=True, dir_okay=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer in tokens.")] = 64,
) -> None:
    """Answer a prompt about images."""
    from flamingo_ft.inference.answer import answer

    typer.echo(answer(adapter, image or [], prompt, max_new_tokens))


@app.command()
def serve(
    model: Adapter,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Port to listen on.")] = 8000,
    allowed_media: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder whose image files requests may name (file:///...); by default none.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    image_urls: Annotated[
        Literal["public", "any", "none"],
        typer.Option(
            help="Fetch images from http(s) URLs: not from private networks, from anywhere, or not at all."
        ),
    ] = "public",
    max_body_mib: Annotated[int, typer.Option(min=1, metavar="N", help="Largest request in MiB.")] = 64,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API, until interrupted."""
    from flamingo_ft.inference import serve

    options = {"allowed_media": allowed_media, "image_urls": image_urls, "max_body_mib": max_body_mib}
    serve.serve(model, host, port, **options)


@app.command()
def merge(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, which must not exist.")],
    base: Annotated[
        Literal["bf16", "dequantized"],
        typer.Option(help="The unquantized weights (bf16), or what the quantized ones stand for."),
    ] = "bf16",
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"], typer.Option(help="Dtype of the merged weights.")
    ] = "bf16",
    quantization: Annotated[
        Literal["none", "int8", "nf4", "fp4"], typer.Option(help="Write the merged model quantized.")
    ] = "none",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="X", help="Deprecated: also refuse logits that differ by more, relatively."
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Held-out samples to measure loss on; at most 32 are answered too."
        ),
    ] = 64,
    margin: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="X",
            help="How much higher its loss may be than the adapter's, in nats per token, beyond two standard errors.",
        ),
    ] = 0.5,
    accuracy_margin: Annotated[
        float,
        typer.Option(
            min=0, max=1, metavar="X", help="How much lower its accuracy may be, 0..1, beyond the same."
        ),
    ] = 0.1,
    start: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the bridge that the adapter builds on is now.")
    ] = None,
    with_code: Annotated[
        bool,
        typer.Option("--with-code", help="Put the code beside it, for transformers without this package."),
    ] = False,
) -> None:
    """Merge an adapter into its base: one standalone model.

    Every written tensor is verified. Loss and accuracy are measured beside the adapter's on held-out samples of the run,
    and a model that is worse by more than the margins is refused.
    """
    from rich.console import Console

    from flamingo_ft.backbones.quantization import DTYPES, Quantization
    from flamingo_ft.cli.report_table import merge_lines, merge_table
    from flamingo_ft.evaluation.merging import merge_adapter

    kept_as = None if quantization == "none" else Quantization(quantization)
    options = {"quantization": kept_as, "tolerance": tolerance, "start": start, "with_code": with_code}
    options |= {"samples": samples, "margin": margin, "accuracy_margin": accuracy_margin}
    report = merge_adapter(adapter, out, base=base, dtype=DTYPES[dtype], **options)
    Console().print(merge_table(report))
    typer.echo(merge_lines(report))
    typer.echo(f"merged model in {out}; ask it: flamingo-ft generate {out} --image FILE --prompt TEXT")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint, an adapter or a model: path or org/name.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder or file to write, which must not exist.")
    ],
    to: Annotated[
        Literal["auto", "adapter", "model", "open_flamingo", "otter"],
        typer.Option(help="What to write; auto: an adapter, or a model where the backbones were changed."),
    ] = "auto",
    language: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The language model it was trained with, as in a recipe."),
    ] = None,
    vision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its tower, by default OpenAI's ViT-L-14.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(metavar="TAG", help="OpenCLIP's tag of the tower's weights.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The checkpoint that SRC builds on, or where its bridge is now."),
    ] = None,
    lora_alpha: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of LoRA in a checkpoint that does not tell it.")
    ] = None,
) -> None:
    """Bring in a checkpoint of OpenFlamingo, Otter or Multimodal-GPT, or write one for OpenFlamingo or Otter."""
    from flamingo_ft import convert as converting

    if to in ("open_flamingo", "otter"):
        given = {
            "--language": language,
            "--vision": vision,
            "--pretrained": pretrained,
            "--lora-alpha": lora_alpha,
        }
        if unused := [option for option, value in given.items() if value is not None]:
            raise UserError(f"found {unused[0]} with --to {to}, which writes what SRC records; leave it out")
        export = converting.export_otter if to == "otter" else converting.export_open_flamingo
        found = export(source, out, start=start)
    else:
        known = converting.Backbones(language, vision, pretrained)
        found = converting.import_checkpoint(source, out, known, to=to, start=start, lora_alpha=lora_alpha)
    for line in (f"{found.source} -> {found.result}", *found.lines):
        typer.echo(line)
    typer.echo(f"{found.result} in {found.out}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Of a run, an adapter or a merged model.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="org/name, made where it is not there.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make repositories that are not there private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to push to, by default main.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge the adapter, and push the whole model.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Share this base on the Hub; by default REPO-base is made."),
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="For the card, such as apache-2.0.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the bridge that the adapter builds on is now.")
    ] = None,
) -> None:
    """Push an adapter and its base, or a merged model, to the Hugging Face Hub."""
    from flamingo_ft import publish

    options = {"private": private, "revision": revision, "merged": merged, "base": base, "license": license_}
    pushed = publish.push(folder, repository, start=start, log=_say, **options)
    typer.echo(
        f"{pushed.repository} is at {pushed.url}" + (f", its base in {pushed.base}" if pushed.base else "")
    )


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Print versions, hardware and missing extras for a bug report; nothing private is in it."""
    import json

    from flamingo_ft.cli.environment import report

    record = report.environment()
    typer.echo(json.dumps(record, indent=2) if as_json else report.as_text(record))


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _tell_sources(data: OpenedData) -> None:
    for part, mixture in (("train", data.train), ("held out", data.eval)):
        for mixed in mixture:
            rows = f"{mixed.size:,} rows" if mixed.source.indexed else "streamed"
            typer.echo(f"{mixed.source.name} ({part}): {rows} of schema {mixed.source.format}", err=True)
            if mixed.source.unread:
                unread = ", ".join(mixed.source.unread)
                typer.echo(
                    f"{mixed.source.name}: columns of text that the schema does not read: {unread}", err=True
                )


def _print_metrics(metrics: dict) -> None:
    from rich.console import Console

    from flamingo_ft.cli.report_table import evaluation_lines, evaluation_tables, training_line

    if metrics.get("eval"):
        for table in evaluation_tables(metrics["eval"]):
            Console().print(table)
        for line in evaluation_lines(metrics["eval"]):
            typer.echo(line)
    if metrics.get("train"):
        typer.echo(training_line(metrics["train"]))


def _print_plan(record: dict, as_json: bool, stderr: bool = False) -> None:
    import json

    from rich.console import Console

    from flamingo_ft.cli.plan_table import plan_tables

    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    for part in plan_tables(record):
        Console(stderr=stderr).print(part)


def _print_findings(record: dict, as_json: bool, folder: Path) -> None:
    import json

    from rich.console import Console

    from flamingo_ft.cli.check_table import check_tables, problem_lines

    kind = "error" if record["on_bad_sample"] == "error" else "skipped"
    for line in problem_lines(record):
        print(f"{kind}: {line}", file=sys.stderr)
    for line in record["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    for part in check_tables(record):
        Console().print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    typer.echo(f"all of it, and the first samples with their tokens, in {folder / 'check.html'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a user's mistake is told in a line, without a traceback."""
    try:
        code = app(arguments, prog_name="flamingo-ft", standalone_mode=False) or 0
    except ReportedElsewhere:
        return MISTAKE
    except OutOfMemory as error:
        code = _refuse(str(error))
        if error.plan:
            _print_plan(error.plan, as_json=False, stderr=True)
        return code
    except UserError as error:
        return _refuse(str(error))
    except StoppedBySignal as stopped:
        return _tell_how_to_go_on(stopped, sys.argv[1:] if arguments is None else arguments)
    except typer.TyperException as error:
        return _refuse(f"{_usage_problem(error)}; see {_command_of(error)} --help")
    except _FILES_OF_THE_USER as error:
        if error.filename is None:
            raise
        return _refuse(f"{error.filename}: {error.strerror}")
    except (MemoryError, OSError, RuntimeError) as error:
        return _refuse(_machine_problem(error))
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code


def _machine_problem(error: Exception) -> str:
    """The line for full memory or a full disk, where a command does not say it better itself. Raises other errors."""
    from flamingo_ft.machine_errors import disk_failure, out_of_memory

    if full := out_of_memory(error):
        return f"{full}; answer fewer questions at once, use a quantized model, or free memory"
    if full := disk_failure(error):
        return f"cannot write ({full}); make room on that disk"
    raise error


def _is_main_process() -> bool:
    """As launchers tell it, before anything slow is imported."""
    return os.environ.get("RANK", "0") == "0"


def _tell_how_to_go_on(stopped: StoppedBySignal, arguments: Sequence[str]) -> int:
    command = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
    if _is_main_process():
        _say(f"{stopped}; go on with: flamingo-ft {shlex.join(command)} --resume")
    return SIGNALLED + stopped.number


def _usage_problem(error: typer.TyperException) -> str:
    """What is wrong with the arguments, however many of them a shell's pattern became."""
    message = error.format_message().rstrip(".")
    if len(message) <= LONGEST_MESSAGE:
        return message
    remedy = (
        "; give an option that takes several values once for each of them"
        if "extra argument" in message
        else ""
    )
    return f"{message[:LONGEST_MESSAGE]} ... ({len(message.split()):,} words){remedy}"


def _command_of(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context else "flamingo-ft"


def _refuse(problems: str) -> int:
    """Print each problem on a line of its own."""
    for problem in problems.splitlines():
        print(f"error: {problem}", file=sys.stderr)
    return MISTAKE
