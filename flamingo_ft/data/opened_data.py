"""A recipe's data, opened: its training and evaluation rows, their encoding, and the steps of an epoch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any, cast

from flamingo_ft import processes
from flamingo_ft.config import DataSection, Recipe
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.model.build import backbone_files, tagged_tiles, text_limit
from flamingo_ft.model.download import is_url

from .box_writer import BoxWriter
from .collate import pack
from .encode import Dropped, encode_within
from .eval_split import split_eval
from .media import open_medium, read_bytes
from .pairs import encode_pair
from .prompts import encode_question
from .render import apply_template
from .sample import Image, Medium, Sample, Video, with_widest_boxes
from .sample_order import SampleIndex, SampleOrder, WeightedSource
from .sources import open_source
from .unpaired import check_both_labels, encode_unpaired, unpaired_sources

MAX_VALIDATED_ROWS = 50_000  # takes some seconds
PACKED_SAMPLES = 1_000  # encoded to estimate how many samples fit into a packed row
# SFT and GRPO read samples with one answer, DPO preference pairs, KTO labelled answers.
ENCODE: dict[str, Callable[..., Any]] = {
    "sft": encode_within,
    "dpo": encode_pair,
    "kto": encode_unpaired,
    "grpo": encode_question,
}


@dataclass(frozen=True)
class OpenedData:
    """The sources of a recipe: ``train``, with weights, and ``eval``, never trained on.

    skipped: why evaluation rows cannot be used, by "FILE: row N".
    """

    section: DataSection
    train: list[WeightedSource]
    eval: list[WeightedSource]
    skipped: dict[str, str] = field(default_factory=dict)

    def samples(self, mixture: Sequence[WeightedSource]) -> Iterator[Sample]:
        """Yield the samples of some of the sources in the order of their rows.

        A bad row raises or is skipped, as ``data.on_bad_sample`` says.
        """
        return itertools.chain.from_iterable(_samples(weighted, self.section) for weighted in mixture)

    def validate_rows(self) -> None:
        """Read all rows of training sources of up to `MAX_VALIDATED_ROWS`, to find bad rows before the run.

        Raises UserError for the first bad one, unless they are skipped. Images are not opened.
        """
        if self.section.on_bad_sample == "skip":
            return
        for weighted in self.train:
            if weighted.source.indexed and weighted.size <= MAX_VALIDATED_ROWS:
                for _ in _samples(weighted, self.section):
                    pass

    def eval_samples(self, max_per_source: int | None = None) -> list[Sample]:
        """Return the first evaluation samples of each source, their images opened once.

        So an unreadable image is found before training, not in an evaluation.
        """
        read = partial(_samples, section=self.section, check_images=True, skipped=self.skipped)
        return [
            sample for weighted in self.eval for sample in itertools.islice(read(weighted), max_per_source)
        ]

    def with_boxes_written(self, samples: Sequence[Sample], processor: FlamingoProcessor) -> list[Sample]:
        """Return evaluation samples with their boxes as text, as a model with this processor reads them.

        A box that is not seen makes its row bad: it raises or is skipped, as ``data.on_bad_sample`` says.
        """
        write, written = BoxWriter(processor.image_processor), []
        for sample in samples:
            try:
                written.append(write(sample))
            except UserError as error:
                if self.section.on_bad_sample == "error":
                    raise
                self.skipped[sample.where] = str(error)
        return written


def open_data(section: DataSection, seed: int) -> OpenedData:
    """Open the sources of a recipe's ``data`` and split off ``eval_fraction``; the seed decides which rows.

    Raises UserError for a source that cannot be opened, or of which nothing can be held out.
    """
    train = [WeightedSource(open_source(entry, section), entry.weight) for entry in section.train]
    evaluated = [WeightedSource(open_source(entry, section)) for entry in section.eval]
    if section.eval_fraction:
        splits = split_eval([weighted.source for weighted in train], section.eval_fraction, seed)
        whole, train = train, []
        for weighted, (train_rows, eval_rows) in zip(whole, splits, strict=True):
            train.append(replace(weighted, rows=train_rows))
            evaluated.append(WeightedSource(weighted.source, rows=eval_rows))
    return OpenedData(section, train, evaluated)


def check_method(sources: Sequence[WeightedSource], method: str) -> None:
    """Raise UserError for a source that ``method`` cannot train on."""
    for weighted in sources:
        source = weighted.source
        is_answered = not (source.is_preference or source.has_label)
        if method == "sft" and not is_answered:
            got, use = ("preference pairs", "dpo") if source.is_preference else ("labelled answers", "kto")
            raise UserError(
                f"{source.name}: expected samples with one answer, got {got}; "
                f"set train.method to {use}, or name another format"
            )
        expected = {
            "dpo": ("preference pairs (prompt, chosen, rejected)", source.is_preference),
            "kto": ("labelled answers (prompt, completion, label) or preference pairs", not is_answered),
            "grpo": ("questions with one answer", is_answered),
        }
        what, fits = expected.get(method, ("", True))
        if not fits:
            raise UserError(
                f"{source.name}: train.method {method} expects {what}, got "
                f"{source.format} samples; name such data, or set train.method to "
                f"{'sft' if is_answered else 'dpo' if source.is_preference else 'kto'}"
            )
    if method == "kto":
        check_both_labels(sources)


def training_sources(data: OpenedData, method: str) -> list[WeightedSource]:
    """Return the sources that batches are drawn from: with kto, preference pairs as two rows each."""
    return unpaired_sources(data.train) if method == "kto" else data.train


def encoder(
    processor: FlamingoProcessor, recipe: Recipe, limit: int, method: str | None = None
) -> Callable[[Sample], Any]:
    """Return the function from a sample to what ``method`` encodes it to, at most ``limit`` tokens per text.

    method: by default the recipe's. Raises UserError as `limit_of_questions` does.
    """
    method = method or recipe.train.method
    if method == "grpo":
        limit = limit_of_questions(recipe, limit)
    return partial(ENCODE[method], processor, max_text_tokens=limit, policy=recipe.data.too_long)


def limit_of_questions(recipe: Recipe, limit: int) -> int:
    """Return the most tokens of a question of grpo, so that its sampled answer is within ``limit`` too.

    Raises UserError if no room is left for a question.
    """
    completion = recipe.train.grpo.max_completion_tokens
    if completion >= limit:
        raise UserError(
            f"train.grpo.max_completion_tokens: got {completion}, which leaves no room for the question: the "
            f"limit is {limit} text tokens; lower it, or raise data.max_text_tokens"
        )
    return limit - completion


def with_max_steps(recipe: Recipe, data: OpenedData) -> Recipe:
    """Return the recipe with ``train.epochs`` converted to ``train.max_steps``, if it sets epochs.

    Raises UserError for a streamed source, whose length is not known.
    """
    epochs = recipe.train.epochs
    if epochs is None:
        return recipe
    per_epoch = steps_per_epoch(recipe, data)
    if per_epoch is None:
        raise UserError(
            f"train.epochs: got {epochs:g}, but a streamed source has no known length; use train.max_steps"
        )
    steps = max(1, math.ceil(exact_fraction(epochs) * per_epoch))
    train = recipe.train.model_copy(update={"max_steps": steps, "epochs": None})
    return recipe.model_copy(update={"train": train})


def steps_per_epoch(recipe: Recipe, data: OpenedData) -> Fraction | None:
    """Return the optimizer steps of an epoch, which draws each row ``weight`` times on average.

    It is a fraction, since an epoch may end within a step, and an estimate with ``data.packing``. None if a
    source is streamed.
    """
    length = samples_per_epoch(recipe, data)
    if length is None:
        return None
    rows = length * _rows_per_sample(recipe, data) if recipe.data.packing else Fraction(length)
    train = recipe.train
    return rows / (train.samples_per_batch * train.gradient_accumulation_steps * processes.world_size())


def samples_per_epoch(recipe: Recipe, data: OpenedData) -> int | None:
    """Return how many samples, or pairs, are drawn in an epoch; None if a source is streamed."""
    sources = training_sources(data, recipe.train.method)
    return SampleOrder(sources, recipe.train.seed).epoch_length


def exact_fraction(number: float) -> Fraction:
    """Return a recipe's number as the decimal fraction that it is written as.

    So 0.1 of 30 steps are 3 steps, not 3.0000000000000004, which would be rounded up to 4.
    """
    return Fraction(repr(number))


def _samples(
    weighted: WeightedSource,
    section: DataSection,
    check_images: bool = False,
    skipped: dict[str, str] | None = None,
) -> Iterator[Sample]:
    """Yield the samples of a source.

    Args:
        check_images: treat a sample whose images cannot be read as bad.
        skipped: receives why rows are skipped, by "FILE: row N".
    """
    source = weighted.source
    if weighted.rows is None:
        rows = enumerate(source.stream())
    else:
        rows = ((row, source.raw(row)) for row in weighted.rows.tolist())
    for row, raw in rows:
        try:
            sample = source.sample(row, raw)
            if check_images:
                sample = _with_opened_images(sample, section.video_frames)
        except UserError as error:
            if section.on_bad_sample == "error":
                raise
            if skipped is not None:
                skipped[source.where(raw)] = str(error)
            continue
        yield sample


def _with_opened_images(sample: Sample, video_frames: int) -> Sample:
    """Return the sample after opening its images once; those at URLs are kept, since they may be gone later.

    Raises UserError for one that cannot be read.
    """
    images = []
    for medium in sample.images:
        images.append(_downloaded(medium, sample.where))
        is_remote = isinstance(medium, str) and is_url(medium)
        open_medium(images[-1], f"{sample.where}: {medium}" if is_remote else sample.where, video_frames)
    return replace(sample, images=images)


def _downloaded(medium: Medium, where: str) -> Medium:
    """Return the medium with the content of URLs in their place."""
    if not isinstance(medium, Video):
        return _downloaded_image(medium, where)
    file = None if medium.file is None else _downloaded_image(medium.file, where)
    return Video(tuple(_downloaded_image(frame, where) for frame in medium.frames), file)


def _downloaded_image(image: Image, where: str) -> Image:
    return read_bytes(image, where) if isinstance(image, str) and is_url(image) else image


def _rows_per_sample(recipe: Recipe, data: OpenedData) -> Fraction:
    """Return the packed rows per drawn sample, of the first samples of the run."""
    files = backbone_files(recipe.model)
    processor = files.processor(tagged_tiles(recipe.data))
    apply_template(processor, recipe.data)
    limit = text_limit(files.language, recipe.data.max_text_tokens)
    encode = encoder(processor, recipe, limit)
    order = SampleOrder(data.train, recipe.train.seed)
    length = cast(int, order.epoch_length)  # None only if a source is streamed
    draws = list(itertools.islice(order.indices(), min(PACKED_SAMPLES, length)))
    sizes = [size for draw in draws if (size := _size(data, draw, encode)) is not None]
    rows = sum(1 for _ in pack(sizes, int, limit))
    return Fraction(max(1, rows), len(draws))


def _size(data: OpenedData, draw: SampleIndex, encode: Any) -> int | None:
    """Return the text tokens of a drawn sample; None if it is skipped or dropped."""
    source = data.train[draw.source].source
    try:
        encoded = encode(with_widest_boxes(source.sample(draw.row, source.raw(draw.row))))
    except UserError:
        return None
    return None if isinstance(encoded, Dropped) else encoded.text_tokens
