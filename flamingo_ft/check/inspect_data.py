"""Inspect a data file for `recipes new`: schema, columns, folder of the images, lengths of the texts.

Nothing is downloaded: tokens are counted with a tokenizer that is on this machine, or estimated from
characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from flamingo_ft.backbones.decoder_layers import NO_CONTEXT_LIMIT, context_length
from flamingo_ft.backbones.language import language_files
from flamingo_ft.backbones.vision import tower_config
from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data import Sample, apply_template, encode, open_source
from flamingo_ft.data.fields import TAR_MEMBERS, has_value, list_field
from flamingo_ft.data.sample import message_text, with_widest_boxes
from flamingo_ft.data.schemas import SCHEMAS
from flamingo_ft.data.schemas.boxes import BOXES
from flamingo_ft.data.sources.source import first_columns, open_row_files
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.questions import answer_lengths, end_tokens_of, questions_of
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.model.build import BackboneFiles
from flamingo_ft.model.download import is_url

MAX_ROWS_READ = 20_000  # a few seconds
ROOT_TRIAL_ROWS = 20  # rows tried with each possible image_root
MAX_FOLDERS = 200  # tried as image_root
CHARACTERS_PER_TOKEN = 3  # English has about 4; overestimating is safer
MESSAGE_TOKENS = 8  # that a chat template writes around a message, roughly

# Common column names of each field, normalized; the first that a file has is taken.
SYNONYMS = {
    "image": (
        "image", "img", "image_path", "img_path", "image_file", "image_name", "img_name", "imgname",
        "file_name", "filename", "photo", "picture",
    ),
    "question": ("question", "query", "prompt", "instruction", "input", "q"),
    "answer": ("answer", "label", "response", "reply", "output", "target", "completion", "ground_truth", "a"),
    "caption": ("caption", "text", "description", "title", "sentence"),
}  # fmt: skip
GUESSED_SCHEMAS = {"vqa": ("question", "answer"), "caption": ("image", "caption")}  # required fields


@dataclass
class TextLengths:
    """Lengths of the samples read, in tokens.

    Attributes:
        counted: with the language model's tokenizer; otherwise estimated from characters.
        context: the language model's context length; None if unknown.
        text_tokens, answer_tokens: the longest text and the longest answer.
        over_context: texts that exceed the context.
    """

    counted: bool
    context: int | None
    text_tokens: int = 0
    answer_tokens: int = 0
    over_context: int = 0


@dataclass
class InspectedData:
    """What a data file holds.

    Attributes:
        entry: the source with the schema, columns and image_root that fit.
        rows: all rows, of which the first ``read`` were read.
        pictured: of the rows read, those with images or videos.
        urls: some images are URLs.
        unread: text columns that the schema ignores.
        problems: errors of rows that cannot be used.
    """

    entry: DataSource
    rows: int
    lengths: TextLengths
    read: int = 0
    pictured: int = 0
    urls: bool = False
    unread: dict[str, None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def first_problem(self) -> str:
        """The first problem, without the path of the file where it is."""
        return self.problems[0].removeprefix(f"{self.entry.path}: ")


class LengthCounter:
    """Count tokens with the tokenizer of ``language`` (a name or folder) if it is on this machine."""

    def __init__(self, language: str):
        self.processor, self.context = _local_processor(language)
        self._ends = frozenset() if self.processor is None else end_tokens_of(self.processor)

    def new_lengths(self) -> TextLengths:
        return TextLengths(self.processor is not None, self.context)

    def add(self, lengths: TextLengths, sample: Sample) -> None:
        """Add a sample to ``lengths``. Raises UserError if the chat template refuses it."""
        if self.processor is None:
            text, answers = _estimated_tokens(sample)
        else:
            encoded = encode(self.processor, sample)
            text, answers = encoded.text_tokens, answer_lengths(self.processor, sample, encoded, self._ends)
        lengths.text_tokens = max(lengths.text_tokens, text)
        lengths.answer_tokens = max([lengths.answer_tokens, *answers])
        lengths.over_context += self.context is not None and text > self.context


def inspect_data(entry: DataSource, counter: LengthCounter) -> InspectedData:
    """Read the data of ``entry`` and fill in what it leaves open: schema, columns, unit of boxes, image_root.

    Raises UserError if the source cannot be opened, fits no schema, or has no usable row.
    """
    entry = _with_image_root(_with_box_unit(_with_schema(entry)))
    source = open_source(entry, _section(entry))
    data = InspectedData(entry, len(source), counter.new_lengths())
    for number in range(min(data.rows, MAX_ROWS_READ)):
        data.read += 1
        try:
            sample = source.sample(number, source.raw(number))
            counter.add(data.lengths, with_widest_boxes(sample))
        except UserError as error:
            data.problems.append(str(error))
            continue
        data.pictured += bool(sample.images)
        data.unread |= dict.fromkeys(sample.unread)
        data.urls |= any(isinstance(image, str) and is_url(image) for image in sample.images)
    if len(data.problems) == data.read:
        raise UserError(f"{data.problems[0]} (and none of the first {data.read:,} rows can be used)")
    return data


def guess_columns(columns: Iterable[str]) -> tuple[str, dict[str, str]] | None:
    """Guess a schema from common column names.

    Returns the schema and the columns whose names differ from its fields, by field; None if no schema fits.
    """
    by_name = {
        re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_"): column
        for column in columns
        if column != TAR_MEMBERS
    }
    by_field: dict[str, str] = {}
    for name, synonyms in SYNONYMS.items():
        matching = [by_name[synonym] for synonym in synonyms if synonym in by_name]
        if matching:
            by_field[name] = matching[0]
    for schema, required in GUESSED_SCHEMAS.items():
        if all(name in by_field for name in required):
            used = dict.fromkeys(["image", *required])
            renamed = {name: by_field[name] for name in used if name in by_field and by_field[name] != name}
            return schema, renamed
    return None


def _with_schema(entry: DataSource) -> DataSource:
    """Return the entry with its format, and with its columns if they have other names than the fields."""
    if entry.format != "auto" or entry.columns:
        return entry.model_copy(update={"format": open_source(entry, _section(entry)).format})
    guess = guess_columns(first_columns(entry))
    guessed = entry.model_copy(update={"format": guess[0], "columns": guess[1]}) if guess else None
    try:
        recognized = open_source(entry, _section(entry)).format
    except UserError:
        if guessed is None:
            raise
        return guessed
    # A file of questions whose answers are called label or text is recognized as captions.
    if recognized == "caption" and guessed is not None and guessed.format == "vqa":
        return guessed
    return entry.model_copy(update={"format": recognized})


def _first_rows(entry: DataSource) -> Iterator[Any]:
    """Yield the rows of the first `ROOT_TRIAL_ROWS` of each file that can be parsed."""
    for file in open_row_files(entry):
        for number, content in enumerate(islice(file.stream(), ROOT_TRIAL_ROWS)):
            with suppress(UserError):
                yield file.parse(content, f"{file.name}: row {number}")


def _with_box_unit(entry: DataSource) -> DataSource:
    """Return the entry with the unit that the boxes of the first rows are in."""
    column = entry.columns.get(BOXES, BOXES)
    rows = islice((row for row in _first_rows(entry) if isinstance(row, Mapping)), ROOT_TRIAL_ROWS)
    numbers = [
        number for row in rows if has_value(row, column) for number in _sides(list_field(row, column, ""))
    ]
    if not numbers or max(numbers) > 1:
        return entry
    return entry.model_copy(update={"box_unit": "relative"})


def _sides(boxes: list[Any]) -> Iterator[float]:
    """Yield the numbers of boxes."""
    for box in boxes:
        sides = box.get("box") if isinstance(box, Mapping) else box
        yield from (side for side in sides or () if isinstance(side, (int, float)))


def _with_image_root(entry: DataSource) -> DataSource:
    """Return the entry with the image_root with which most of the first rows can be used."""
    assert entry.path is not None
    if entry.image_root is not None or entry.path.is_dir() or _usable_rows(entry) == ROOT_TRIAL_ROWS:
        return entry
    roots = _folders_near(entry.path.parent)
    candidates = [entry, *(entry.model_copy(update={"image_root": root}) for root in roots)]
    return max(candidates, key=_usable_rows)  # the first of equally good ones


def _usable_rows(entry: DataSource) -> int:
    """Count the usable rows of the first `ROOT_TRIAL_ROWS`; if all are usable, return that number.

    Rows are streamed, which avoids indexing a large file once per folder, unless rows refer to other rows.
    """
    needs_file = entry.format in SCHEMAS and SCHEMAS[entry.format].open_file is not None
    trial = entry.model_copy(update={"streaming": not needs_file, "limit": ROOT_TRIAL_ROWS})
    source = open_source(trial, _section(trial))
    rows = usable = 0
    for rows, raw in enumerate(source.stream(), start=1):
        try:
            source.sample(rows - 1, raw)
        except UserError:
            continue
        usable += 1
    return ROOT_TRIAL_ROWS if usable == rows else usable


def _folders_near(folder: Path) -> list[Path]:
    """Return the folders up to two levels below ``folder``, and the two above it."""
    below = (path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)))
    folders = (path for path in below if path.is_dir() and not path.name.startswith("."))
    return [*islice(folders, MAX_FOLDERS), folder.parent, folder.parent.parent]


def _section(entry: DataSource) -> DataSection:
    """Return a data section with the entry; URLs are allowed because no image is opened."""
    return DataSection(train=(entry,), allow_urls=True)


def _local_processor(language: str) -> tuple[FlamingoProcessor | None, int | None]:
    """Return a processor with the language model's tokenizer, and its context length, if on this machine."""
    try:
        config, tokenizer = language_files(language, local_files_only=True)
    except UserError:
        return None, None
    processor = BackboneFiles(tower_config("nano"), None, config, tokenizer).processor()
    apply_template(processor, DataSection(train=(DataSource(path=Path()),)))
    context = context_length(config)
    return processor, None if context >= NO_CONTEXT_LIMIT else context


def _estimated_tokens(sample: Sample) -> tuple[int, list[int]]:
    """Estimate the tokens of the text and of each answer from characters."""
    messages = [*sample.messages, *(sample.rejected or ())]
    text = sum(_tokens(message_text(message)) + MESSAGE_TOKENS for message in messages)
    return text, [_tokens(question.answer) + 1 for question in questions_of([sample])]


def _tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)
