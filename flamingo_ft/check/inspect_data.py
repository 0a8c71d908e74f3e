"""What a file of samples is, as a starting recipe has to know it: its schema, where its images are, how long it is.

Nothing is downloaded: lengths are counted with a tokenizer that is on this machine, or estimated from characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from flamingo_ft.backbones.decoder_layers import NO_CONTEXT_LIMIT, context_length
from flamingo_ft.backbones.language import language_files
from flamingo_ft.backbones.vision import tower_config
from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data import Sample, apply_template, encode, open_source
from flamingo_ft.data.fields import TAR_MEMBERS
from flamingo_ft.data.sample import message_text
from flamingo_ft.data.schemas.table import MIMICIT
from flamingo_ft.data.sources.source import open_row_files
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.questions import answer_lengths, end_tokens_of, questions_of
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.model.backbone_files import BackboneFiles
from flamingo_ft.model.download import is_url

ROWS_READ = 20_000  # some seconds
ROWS_TRIED = 20  # to find the folder of their images
MOST_FOLDERS = 200
CHARACTERS_PER_TOKEN = 3  # English has about 4; an estimate should rather be too long
MESSAGE_TOKENS = 8  # that a chat template writes around a message, about

# Column names that people use for a field, normalised; the first that a file has is taken.
SYNONYMS = {
    "image": (
        "image", "img", "image_path", "img_path", "image_file", "image_name", "img_name", "imgname", "file_name",
        "filename", "photo", "picture",
    ),
    "question": ("question", "query", "prompt", "instruction", "input", "q"),
    "answer": ("answer", "label", "response", "reply", "output", "target", "completion", "ground_truth", "a"),
    "caption": ("caption", "text", "description", "title", "sentence"),
}  # fmt: skip


@dataclass
class TextLengths:
    """Of the samples read: the longest text and the longest answer, in tokens, and how many texts exceed the context.

    counted: with the language model's tokenizer; else estimated. context: of the language model; None: not known.
    """

    counted: bool
    context: int | None
    text_tokens: int = 0
    answer_tokens: int = 0
    over_context: int = 0


@dataclass
class InspectedData:
    """entry: with the schema, columns and image_root that fit. read: how many of ``rows`` were read. problems: why some of
    those cannot be used. urls: whether images are URLs. pictured: how many of the rows have images or videos. unread:
    columns of text that are left out."""

    entry: DataSource
    rows: int
    lengths: TextLengths
    read: int = 0
    urls: bool = False
    pictured: int = 0
    unread: dict[str, None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class LengthCounter:
    """Measures samples with the tokenizer of ``language``, a name or folder, if that is on this machine."""

    def __init__(self, language: str):
        self.processor, self.context = _local_processor(language)
        self._ends = frozenset() if self.processor is None else end_tokens_of(self.processor)

    def lengths(self) -> TextLengths:
        """Nothing measured yet."""
        return TextLengths(self.processor is not None, self.context)

    def add(self, lengths: TextLengths, sample: Sample) -> None:
        """UserError for a sample that the chat template refuses."""
        if self.processor is None:
            text, answers = _estimated(sample)
        else:
            encoded = encode(self.processor, sample)
            text, answers = encoded.text_tokens, answer_lengths(self.processor, sample, encoded, self._ends)
        lengths.text_tokens = max(lengths.text_tokens, text)
        lengths.answer_tokens = max([lengths.answer_tokens, *answers])
        lengths.over_context += self.context is not None and text > self.context


def inspect_data(entry: DataSource, measure: LengthCounter) -> InspectedData:
    """Read ``entry``, and find out what it leaves open: schema, columns, image_root.

    Raises UserError for a source that cannot be opened or fits no schema, and where none of its rows can be used.
    """
    entry = _with_image_root(_with_schema(entry))
    source = open_source(entry, _section(entry))
    found = InspectedData(entry, len(source), measure.lengths())
    for number in range(min(found.rows, ROWS_READ)):
        found.read += 1
        try:
            sample = source.sample(number, source.raw(number))
            measure.add(found.lengths, sample)
        except UserError as error:
            found.problems.append(str(error))
            continue
        found.pictured += bool(sample.images)
        found.unread |= dict.fromkeys(sample.unread)
        found.urls |= any(isinstance(image, str) and is_url(image) for image in sample.images)
    if len(found.problems) == found.read:
        raise UserError(f"{found.problems[0]} (and none of the first {found.read:,} rows can be used)")
    return found


def guess_columns(columns: Iterable[str]) -> tuple[str, dict[str, str]] | None:
    """A schema that columns fit by the names that people use, and which column is which of its fields."""
    by_name = {
        re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_"): column
        for column in columns
        if column != TAR_MEMBERS
    }
    found = {
        name: next((by_name[synonym] for synonym in synonyms if synonym in by_name), None)
        for name, synonyms in SYNONYMS.items()
    }
    for schema, fields in (("vqa", ("question", "answer")), ("caption", ("image", "caption"))):
        if all(found[name] for name in fields):
            used = {name: found[name] for name in ("image", *fields) if found[name]}
            return schema, {name: column for name, column in used.items() if name != column}
    return None


def _with_schema(entry: DataSource) -> DataSource:
    """The entry with its format, and where columns have other names, with those."""
    if entry.format != "auto" or entry.columns:
        return entry.model_copy(update={"format": open_source(entry, _section(entry)).format})
    guess = guess_columns(_first_columns(entry))
    guessed = entry.model_copy(update={"format": guess[0], "columns": guess[1]}) if guess else None
    try:
        recognised = open_source(entry, _section(entry)).format
    except UserError:
        if guessed is None:
            raise
        return guessed
    # A caption may be what a question and its answer are taken for where the answer is called label or text.
    if recognised == "caption" and guess is not None and guess[0] == "vqa":
        return guessed
    return entry.model_copy(update={"format": recognised})


def _first_columns(entry: DataSource) -> list[str]:
    """The columns of the first row that can be parsed; none where rows are no mappings."""
    for file in open_row_files(entry):
        for number, content in enumerate(islice(file.stream(), ROWS_TRIED)):
            try:
                row = file.parse(content, f"{file.name}: row {number}")
            except UserError:
                continue
            return list(row) if isinstance(row, Mapping) else []
    return []


def _with_image_root(entry: DataSource) -> DataSource:
    """The entry with the image_root in which most of the first rows can be used."""
    if entry.image_root is not None or entry.path.is_dir() or _usable(entry) == ROWS_TRIED:
        return entry
    candidates = [
        entry,
        *(entry.model_copy(update={"image_root": root}) for root in _folders_near(entry.path.parent)),
    ]
    return max(candidates, key=_usable)  # the first of equally good ones


def _usable(entry: DataSource) -> int:
    """How many of the first rows can be used; all of a file with few rows count as `ROWS_TRIED`.

    They are streamed, so that a large file is not indexed for every folder; MIMIC-IT's rows refer to others by number.
    """
    trial = entry.model_copy(update={"streaming": entry.format != MIMICIT, "limit": ROWS_TRIED})
    source, rows, usable = open_source(trial, _section(trial)), 0, 0
    for rows, raw in enumerate(source.stream(), start=1):
        try:
            source.sample(rows - 1, raw)
        except UserError:
            continue
        usable += 1
    return ROWS_TRIED if usable == rows else usable


def _folders_near(folder: Path) -> list[Path]:
    """Folders below ``folder``, two levels deep, and the two above it."""
    below = (path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)))
    folders = (path for path in below if path.is_dir() and not path.name.startswith("."))
    return [*islice(folders, MOST_FOLDERS), folder.parent, folder.parent.parent]


def _section(entry: DataSource) -> DataSection:
    """URLs are allowed, for no image is opened."""
    return DataSection(train=(entry,), allow_urls=True)


def _local_processor(language: str) -> tuple[FlamingoProcessor | None, int | None]:
    """A processor with a language model's tokenizer, and its context length; None if it is not on this machine."""
    try:
        config, tokenizer = language_files(language, local_files_only=True)
    except UserError:
        return None, None
    processor = BackboneFiles(tower_config("nano"), None, config, tokenizer).processor()
    apply_template(processor, DataSection(train=(DataSource(path=Path()),)))
    context = context_length(config)
    return processor, None if context >= NO_CONTEXT_LIMIT else context


def _estimated(sample: Sample) -> tuple[int, list[int]]:
    """Text tokens, and those of each answer, by the number of characters."""
    texts = [*sample.messages, *(sample.rejected or ())]
    text = sum(_tokens(message_text(message)) + MESSAGE_TOKENS for message in texts)
    return text, [_tokens(question.answer) + 1 for question in questions_of([sample])]


def _tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)
