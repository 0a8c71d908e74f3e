"""Answer every row of a file or folder: `flamingo-ft generate --data`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from flamingo_ft.data.boxes import placed_boxes
from flamingo_ft.data.sample import Medium, Video, display_text
from flamingo_ft.errors import UserError
from flamingo_ft.model.geometry import ImageGeometry

from .answers_file import AnswersFile
from .media_inputs import LoadedMedium
from .predictor import Predictor
from .prompts import Prompt
from .prompts_of_data import Row

BATCHES_PER_WINDOW = 4  # rows of similar length are answered together within a window
READERS = 4  # threads that read images

Loading = tuple[Row, "Future[list[LoadedMedium]] | None"]  # None for a row that has no prompt


@dataclass
class Summary:
    """How many rows were answered, and how many were skipped."""

    answered: int = 0
    skipped: int = 0


def answer_rows(
    predictor: Predictor,
    rows: Iterable[Row],
    file: AnswersFile,
    *,
    skip_bad: bool = False,
    on_rows: Callable[[int], None] = lambda count: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Answer ``rows`` in their order and append them to ``file``, which may hold the first of them already.

    A window of some batches is read while the one before it is answered, and written as a whole; windows are
    the same after a resume, so that the file is, too. A row that cannot be read or is too long ends the run
    with UserError; with ``skip_bad`` it is written with its ``error``. on_rows: called with the number of
    rows that are done. warn: called with a line for each skipped row.
    """
    summary, size = Summary(), predictor.batch_size * BATCHES_PER_WINDOW
    with ThreadPoolExecutor(READERS, "reading") as pool:
        windows = _read_ahead(predictor, _to_answer(_windows(rows, size), file.rows, on_rows), pool)
        for first, window in windows:
            records = _answered(predictor, window, first, skip_bad)
            for error in (record["error"] for record in records if "error" in record):
                warn(f"skipped: {error}")
                summary.skipped += 1
            summary.answered += sum("answer" in record for record in records)
            file.write(records[max(0, file.rows - first) :])
            on_rows(len(records))
    return summary


def _windows(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    rows = iter(rows)
    while window := list(islice(rows, size)):
        yield window


def _to_answer(
    windows: Iterable[list[Row]], done: int, on_rows: Callable[[int], None]
) -> Iterator[tuple[int, list[Row]]]:
    """Yield the windows with rows that are not in the file yet, and the number of the first row of each."""
    first = 0
    for window in windows:
        if first + len(window) > done:
            yield first, window
        else:
            on_rows(len(window))
        first += len(window)


def _read_ahead(
    predictor: Predictor, windows: Iterable[tuple[int, list[Row]]], pool: ThreadPoolExecutor
) -> Iterator[tuple[int, list[Loading]]]:
    """Yield each window while the images of the next one are being read."""

    def begin(row: Row) -> Loading:
        return row, None if row.prompt is None else pool.submit(predictor.media.load, row.prompt)

    waiting = None
    for first, window in windows:
        reading = first, [begin(row) for row in window]
        if waiting is not None:
            yield waiting
        waiting = reading
    if waiting is not None:
        yield waiting


def _answered(
    predictor: Predictor, window: list[Loading], first: int, skip_bad: bool
) -> list[dict[str, Any]]:
    """Return the record of each row of a window."""
    records, prompts = [], {}
    for number, (row, loading) in enumerate(window):
        records.append(record_of(row))
        try:
            prompts[number] = _checked(predictor, row, loading)
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{error}; or pass --skip-bad") from None
            records[-1]["error"] = str(error)
    seed = predictor.decoding.seed
    if seed is not None:
        seed += first  # else every window would draw the same numbers
    answers = predictor.answer(list(prompts.values()), seed=seed)
    for number, answer in zip(prompts, answers, strict=True):
        records[number]["answer"] = answer
        row, _ = window[number]
        geometries = [_geometry(predictor, image) for image in prompts[number].images]
        if boxes := placed_boxes(answer, geometries, row.boxes):
            records[number]["boxes"] = [[round(side, 1) for side in placed.box] for placed in boxes]
    return records


def _geometry(predictor: Predictor, medium: LoadedMedium) -> ImageGeometry | None:
    """Return how the model sees an image that was read; None for a video, which has no boxes."""
    if medium.image_size is None:
        return None
    return predictor.processor.image_processor.geometry(ImageGeometry.of(*medium.image_size))


def _checked(predictor: Predictor, row: Row, loading: Future[list[LoadedMedium]] | None) -> Prompt:
    """Return the prompt with its images read. Raises UserError for a bad image, and if it is too long."""
    if row.prompt is None or loading is None:
        raise UserError(row.error or f"{row.where}: no prompt")
    prompt = replace(row.prompt, images=loading.result())
    predictor.encode([prompt])
    return prompt


def record_of(row: Row) -> dict[str, Any]:
    """Return what the file of answers says about a row besides its answer."""
    record: dict[str, Any] = {"where": row.where}
    if row.prompt is not None:
        record["images"] = [name_of(image) for image in row.prompt.images]
        record["prompt"] = display_text(row.prompt.messages[-1]).strip()
    if row.reference is not None:
        record["reference"] = row.reference
    return record


def name_of(medium: Medium) -> str:
    """Return the path or URL of an image or video, or its size if the row holds its content."""
    if isinstance(medium, Video):
        frames = ", ".join(map(name_of, medium.frames))
        return frames if medium.file is None else name_of(medium.file)
    return f"{len(medium):,} bytes" if isinstance(medium, bytes) else medium
