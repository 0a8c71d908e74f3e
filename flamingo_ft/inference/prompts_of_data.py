"""The rows of a file or folder as prompts, one each: what `flamingo-ft generate --data` asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data import Sample
from flamingo_ft.data.files import is_system_file
from flamingo_ft.data.read_like import read_like
from flamingo_ft.data.render import is_document
from flamingo_ft.data.sample import Box, boxes_in, message_text
from flamingo_ft.data.schemas.boxes import BoxUnit
from flamingo_ft.data.sources.image_folder import is_image
from flamingo_ft.data.sources.source import Source
from flamingo_ft.data.unanswered import UNANSWERED, answer_filler
from flamingo_ft.errors import UserError

from .prompts import Prompt, make_prompt


@dataclass(frozen=True)
class Row:
    """A row of data: its prompt and, if it has one, the reference answer; or what is wrong with it.

    boxes: those in the reference answer.
    """

    where: str
    prompt: Prompt | None = None
    reference: str | None = None
    error: str | None = None
    boxes: tuple[Box, ...] = ()


class Rows:
    """The rows of a data file, of a dataset's folder, or of a folder of images, in their order.

    prompt: asked about rows that are images alone. left_out: files of a folder that are no images. count: how
    many rows there are; None if that is known only at the end. box_unit: of the rows' boxes. known: sources
    of the run, for files with columns of their names (`read_like`). Iterating yields every row; one that
    cannot be read has an ``error``. Boxes in prompts are text only once `write_boxes` is set.

    Raises UserError for data without rows or of an unknown format, and for a prompt where rows ask their own
    questions.
    """

    def __init__(
        self,
        data: Path,
        prompt: str | None = None,
        image_root: Path | None = None,
        box_unit: BoxUnit = "pixels",
        known: Sequence[DataSource] = (),
    ):
        self._prompt = prompt
        self.write_boxes: Callable[[Sample], Sample] = lambda sample: sample
        self._images, self.left_out = image_files(data) if data.is_dir() else ([], 0)
        self._source: Source | None = None
        if not self._images:
            self._source = self._open(read_like(data, known, self._open), image_root, box_unit)
            if prompt is not None and not self._asks(prompt):
                raise UserError(f"--prompt: the rows of {data} ask their own questions; remove it")

    def _open(
        self, source: DataSource, image_root: Path | None = None, box_unit: BoxUnit = "pixels"
    ) -> Source:
        given = {"image_root": image_root or source.image_root}
        given |= {} if box_unit == "pixels" else {"box_unit": box_unit}
        entry = source.model_copy(update=given)
        return Source(entry, DataSection(train=(entry,)), answer_filler(self._prompt, source.columns))

    @property
    def count(self) -> int | None:
        """Number of rows."""
        if self._source is None:
            return len(self._images)
        return len(self._source) if self._source.indexed else None

    def __iter__(self) -> Iterator[Row]:
        if self._source is None:
            for file in self._images:
                yield Row(str(file), make_prompt([str(file)], self._prompt))
            return
        for number, raw in enumerate(self._source.stream()):
            where = self._source.where(raw)
            try:
                yield row_of(self.write_boxes(self._source.sample(number, raw)))
            except UserError as error:
                yield Row(where, error=str(error))

    def _asks(self, prompt: str) -> bool:
        """Whether the first row that can be read is asked ``prompt``."""
        first = next((row.prompt for row in self if row.prompt is not None), None)
        return first is None or message_text(first.messages[-1]) == prompt


def row_of(sample: Sample) -> Row:
    """Return the row that asks for the last answer of a sample, or for the text after its last image."""
    *before, last = sample.messages
    if is_document(sample.messages):
        blocks = last["content"]
        cut = 1 + max((i for i, block in enumerate(blocks) if block["type"] == "image"), default=-1)
        before, last = [{**last, "content": blocks[:cut]}], {"content": blocks[cut:]}
        answer = message_text(last).strip()
    else:
        answer = message_text(last)
    if not before or not before[0]["content"]:
        raise UserError(f"{sample.where}: nothing to answer; it has neither a question nor an image")
    reference = None if answer == UNANSWERED else answer
    boxes = tuple(sample.boxes[number] for number in boxes_in(last))
    return Row(sample.where, Prompt(before, sample.images, sample.where), reference, boxes=boxes)


def image_files(folder: Path) -> tuple[list[Path], int]:
    """Return the images in a folder and in those inside it, sorted, and the number of its other files.

    No images if it holds a dataset's files.
    """
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not is_system_file(str(file.relative_to(folder)))
    )
    if any(file.suffix.lower() in (".arrow", ".parquet", ".json", ".jsonl", ".csv") for file in files):
        return [], 0
    images = [file for file in files if is_image(file)]
    return images, len(files) - len(images)
