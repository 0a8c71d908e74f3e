"""Commands that show a model's answers: `generate`, for one prompt or a file of them, and `chat`."""

from __future__ import annotations

import secrets
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from flamingo_ft.cli.arguments import (
    Adapter,
    AnswerDtype,
    AnswerQuantization,
    BoxUnit,
    ImageRoot,
    LengthPenalty,
    MaxNewTokens,
    MinNewTokens,
    NoRepeatNgramSize,
    NumBeams,
    RepetitionPenalty,
    Seed,
    StartPath,
    StopString,
    System,
    Temperature,
    TopK,
    TopP,
    refuse_options,
)
from flamingo_ft.errors import UserError


def generate(
    adapter: Adapter,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Question about the images. A model trained on captions needs none.",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="An image; repeat it for several, in order.", exists=True),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="Answer every row of a file, in any format that training reads (answers may be missing), or "
            "ask --prompt about every image of a folder.",
            exists=True,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --data: the file of answers, .jsonl or .csv.", dir_okay=False
        ),
    ] = None,
    image_root: ImageRoot = None,
    box_unit: BoxUnit = "pixels",
    batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --data: rows answered together; 8.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="With --data: go on after a row that cannot be answered.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --data: continue an unfinished file of answers.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --data: replace an existing file of answers.")
    ] = False,
    max_new_tokens: MaxNewTokens = 64,
    min_new_tokens: MinNewTokens = None,
    num_beams: NumBeams = 1,
    length_penalty: LengthPenalty = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    no_repeat_ngram_size: NoRepeatNgramSize = None,
    stop_string: StopString = None,
    seed: Seed = None,
    quantization: AnswerQuantization = None,
    dtype: AnswerDtype = "auto",
    start: StartPath = None,
) -> None:
    """Answer a prompt about images, or every row of a file."""
    arguments = locals()
    if data is None:
        unused = {"--out": out, "--image-root": image_root, "--batch-size": batch_size,
                  "--box-unit": box_unit != "pixels", "--skip-bad": skip_bad, "--resume": resume,
                  "--overwrite": overwrite}  # fmt: skip
        refuse_options(unused, "only used with --data; remove it")
        _generate_one(adapter, image or [], prompt, arguments)
        return
    refuse_options({"--image": image}, "not used with --data, whose rows have their own; remove it")
    if out is None:
        raise UserError("--out: missing; name the file to write the answers to, such as answers.jsonl")
    from flamingo_ft.inference.generate import generate_file

    generate_file(
        adapter,
        data,
        out,
        prompt=prompt,
        image_root=image_root,
        box_unit=box_unit,
        batch_size=batch_size,
        start=start,
        quantization=quantization,
        dtype=dtype,
        skip_bad=skip_bad,
        resume=resume,
        overwrite=overwrite,
        log=partial(typer.echo, err=True),
        **_decoding(arguments),
    )


def chat(
    adapter: Adapter,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    no_repeat_ngram_size: NoRepeatNgramSize = None,
    stop_string: StopString = None,
    seed: Seed = None,
    quantization: AnswerQuantization = None,
    dtype: AnswerDtype = "auto",
    start: StartPath = None,
) -> None:
    """Talk with a model in the terminal; /image FILE shows it an image, /help lists the commands."""
    arguments = locals()
    from flamingo_ft.inference.chat import Chat, run
    from flamingo_ft.inference.conversation import Conversation
    from flamingo_ft.inference.predictor import Predictor

    options = _varied(_decoding(arguments))
    predictor = Predictor.from_pretrained(
        adapter, start=start, quantization=quantization, dtype=dtype, **options
    )
    interactive = sys.stdin.isatty()
    if interactive:
        _edit_lines()
        typer.echo("/image FILE shows an image, /help lists the commands, Ctrl-D leaves", err=True)
    run(
        Chat(Conversation(predictor, system)),
        read=input if interactive else _read_and_echo,
        write=_write,
        warn=lambda line: typer.echo(f"error: {line}", err=True),
    )


def _generate_one(adapter: str, images: list[Path], prompt: str | None, arguments: dict[str, Any]) -> None:
    if prompt is None and not images:
        raise UserError("--prompt: missing; ask something, or name an --image to caption")
    if folder := next((path for path in images if path.is_dir()), None):
        raise UserError(
            f"--image: {folder} is a folder; name a file, or ask about every image of the folder with "
            f"--data {folder} --out answers.jsonl"
        )
    from flamingo_ft.inference.answer import answer_with_boxes

    loading = {name: arguments[name] for name in ("start", "quantization", "dtype")}
    text, boxes = answer_with_boxes(adapter, images, prompt, **loading, **_varied(_decoding(arguments)))
    typer.echo(text)
    if boxes:
        pixels = ", ".join(str([round(side) for side in box]) for box in boxes)
        typer.echo(f"in pixels of {images[0].name}: {pixels}")


def _decoding(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the decoding options among a command's arguments, under the names of `Decoding`."""
    from flamingo_ft.inference.decoding import Decoding

    options = {field.name: arguments[field.name] for field in fields(Decoding) if field.name in arguments}
    return {**options, "stop_strings": tuple(arguments["stop_string"] or ())}


def _varied(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with a new seed if they sample without one: torch's own is always the same."""
    samples = options["temperature"] or options["top_k"] or options["top_p"]
    return {**options, "seed": secrets.randbelow(2**31)} if samples and options["seed"] is None else options


def _edit_lines() -> None:
    """Let ``input`` edit lines and recall earlier ones, where the system's library for that is there."""
    try:
        import readline  # noqa: F401 (its import is what changes `input`)
    except ImportError:
        return


def _read_and_echo(prompt: str) -> str:
    """Return the next line of a file or a pipe, and print it as a terminal does: a log has questions too."""
    line = input()
    _write(f"{prompt}{line}\n")
    return line


def _write(text: str) -> None:
    """Print a piece of an answer as it comes."""
    typer.echo(text, nl=False)
    sys.stdout.flush()
