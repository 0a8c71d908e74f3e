"""From a file or folder to a file of answers, as `flamingo-ft generate --data` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flamingo_ft.config import RECIPE_FILE
from flamingo_ft.data.box_writer import BoxWriter
from flamingo_ft.data.read_like import recorded_sources
from flamingo_ft.data.schemas.boxes import BoxUnit
from flamingo_ft.data.sources.tar_samples import IMAGES
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import plural
from flamingo_ft.hub import fetch_model
from flamingo_ft.progress import progress_bars

from .answers_file import AnswersFile
from .batch import Summary, answer_rows
from .decoding import Decoding
from .predictor import BATCH_SIZE, Predictor
from .prompts_of_data import Rows


def generate_file(
    adapter: str | Path,
    data: Path,
    out: Path,
    *,
    prompt: str | None = None,
    image_root: Path | None = None,
    box_unit: BoxUnit = "pixels",
    batch_size: int | None = None,
    start: str | Path | None = None,
    quantization: str | None = None,
    dtype: str = "auto",
    skip_bad: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Summary:
    """Answer every row of ``data`` with an adapter or a merged model and write the answers to ``out``.

    data: a file in a format that training reads, where answers may be missing, or a folder of images, about
    which ``prompt`` is asked. box_unit: of the rows' boxes. out, resume, overwrite: see `AnswersFile`.
    skip_bad: see `answer_rows`.
    start, quantization, dtype, options: see `Predictor.from_pretrained` and `Decoding`. log: called with
    lines about skipped rows, and a last one with the numbers.
    """
    decoding = Decoding(**options)
    if decoding.samples and decoding.seed is None:
        options["seed"] = 0  # so that a resumed file is the same
        decoding = Decoding(**options)
    folder = fetch_model(adapter)
    rows = Rows(data, prompt, image_root, box_unit, recorded_sources(folder / RECIPE_FILE))
    if rows.left_out:
        log(f"{data}: left out {plural(rows.left_out, 'file')} of other types than {', '.join(IMAGES)}")
    settings = {"model": str(adapter), "data": str(data.absolute()), "prompt": prompt,
                "box_unit": box_unit,
                "batch_size": batch_size or BATCH_SIZE, "quantization": quantization, "dtype": dtype,
                **decoding.generate_options(), "max_new_tokens": decoding.max_new_tokens,
                "stop_strings": list(decoding.stop_strings), "seed": decoding.seed}  # fmt: skip
    file = AnswersFile(out, settings, resume=resume, overwrite=overwrite)
    if file.is_complete:
        log(f"{out} is complete")
        return Summary()
    try:
        predictor = Predictor.from_pretrained(
            folder,
            start=start,
            quantization=quantization,
            dtype=dtype,
            batch_size=batch_size or BATCH_SIZE,
            **options,
        )
        rows.write_boxes = BoxWriter(predictor.processor.image_processor)
        with progress_bars(stderr=True) as progress:
            bar = progress.add_task("answering", total=rows.count, note="")
            summary = answer_rows(
                predictor,
                rows,
                file,
                skip_bad=skip_bad,
                on_rows=lambda count: progress.advance(bar, count),
                warn=progress.line,
            )
    finally:
        file.close()
    file.finish()
    if file.rows and summary.skipped == file.rows:
        raise UserError(f"{data}: no row could be answered, got {file.rows:,}; {out} says why")
    skipped = f", {summary.skipped:,} skipped" if summary.skipped else ""
    log(f"{plural(file.rows, 'row')} in {out}{skipped}")
    return summary
