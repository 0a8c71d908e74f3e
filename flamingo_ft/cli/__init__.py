"""The command line: parse arguments, call the package, print the result.

Commands import what they call inside their functions, so that help and refused arguments come without the
seconds that it takes to import torch.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from flamingo_ft.cli import answers, environment, generate, models, recipes, train
from flamingo_ft.cli.output import package_log_as_lines
from flamingo_ft.errors import OutOfMemory, ReportedElsewhere, StoppedBySignal, UserError

EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_SIGNAL = 2, 130, 128  # the last one plus the signal's number
MAX_USAGE_CHARACTERS = 200
_FILE_ERRORS = (  # OSErrors about a file that the user named
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)

app = typer.Typer(
    help="Fine-tune Flamingo-style vision-language models with frozen backbones, on one GPU or none.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


app.command()(train.train)
app.command()(recipes.plan)
app.command()(recipes.check)
app.command("eval")(answers.evaluate)
app.command()(generate.generate)
app.command()(generate.chat)
app.command()(answers.serve)
app.command()(answers.demo)
app.command()(models.merge)
app.command()(models.convert)
app.command()(models.push)
app.command()(environment.env)
app.add_typer(recipes.recipes_app, name="recipes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; user errors are printed as one line, without a traceback."""
    if not sys.stderr.isatty():  # each state of a bar would be a line of its own
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with package_log_as_lines():
            code = app(arguments, prog_name="flamingo-ft", standalone_mode=False) or 0
    except ReportedElsewhere:
        return EXIT_USER_ERROR
    except OutOfMemory as error:
        code = _print_errors(str(error))
        if error.plan:
            from flamingo_ft.cli.recipe_tables import print_plan

            print_plan(error.plan, as_json=False, stderr=True)
        return code
    except UserError as error:
        return _print_errors(str(error))
    except StoppedBySignal as stopped:
        _print_how_to_resume(stopped, sys.argv[1:] if arguments is None else arguments)
        return EXIT_SIGNAL + stopped.number
    except typer.TyperException as error:
        return _print_errors(_usage_error(error))
    except _FILE_ERRORS as error:
        if error.filename is None:
            raise
        return _print_errors(f"{error.filename}: {error.strerror}")
    except (MemoryError, OSError, RuntimeError) as error:
        return _print_errors(_machine_error(error))
    if code == EXIT_INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code


def _print_errors(messages: str) -> int:
    """Print each line of ``messages`` as an error and return the exit code."""
    for message in messages.splitlines():
        print(f"error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


def _print_how_to_resume(stopped: StoppedBySignal, arguments: Sequence[str]) -> None:
    if train.is_main_process():
        command = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
        print(f"{stopped}; resume with: flamingo-ft {shlex.join(command)} --resume", file=sys.stderr)


def _usage_error(error: typer.TyperException) -> str:
    """Return the message for invalid arguments, shortened: a shell may expand a pattern to thousands."""
    message = error.format_message().rstrip(".")
    if len(message) > MAX_USAGE_CHARACTERS:
        is_list_option = "extra argument" in message
        remedy = "; repeat an option that takes several values for each of them" if is_list_option else ""
        message = f"{message[:MAX_USAGE_CHARACTERS]} ... ({len(message.split()):,} words){remedy}"
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path if context else 'flamingo-ft'} --help"


def _machine_error(error: Exception) -> str:
    """Return the message for an out-of-memory or full-disk error that no command handled; raise any other."""
    from flamingo_ft.machine_errors import disk_failure, out_of_memory

    if problem := out_of_memory(error):
        return f"{problem}; answer fewer questions at once, use a quantized model, or free memory"
    if problem := disk_failure(error):
        return f"cannot write ({problem}); make room on that disk"
    raise error
