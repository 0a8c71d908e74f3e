"""The ``data`` section of a recipe: where samples come from and how they are prepared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from flamingo_ft.config.section import LAX, Count, InputPath, Section, SharedPath, one_of
from flamingo_ft.config.tables import DATASET_FORMATS

if TYPE_CHECKING:
    from flamingo_ft.config.schema import Recipe

FORMATS = ("auto", *DATASET_FORMATS)
DataFormat = Annotated[str, one_of(DATASET_FORMATS, "auto"), Field(json_schema_extra={"enum": [*FORMATS]})]


class DataSource(Section):
    """One source of samples: data files, a folder of images, or a dataset on the Hugging Face Hub."""

    path: InputPath | None = None
    """Data file (JSON, JSONL, CSV, TSV, Parquet, Arrow or a WebDataset tar), a pattern that matches several
    (`shards/*.tar`), or a folder of images. Relative to the recipe file; in an override, to the current directory. Set
    either path or hub."""
    hub: str | None = None
    """Dataset on the Hugging Face Hub, as org/name. Set either path or hub."""
    config: str | None = None
    """Configuration (subset) of the Hub dataset. null: its default."""
    split: str = "train"
    """Split of the Hub dataset, or of a dataset folder, to read."""
    revision: str | None = None
    """Branch, tag or commit of the Hub dataset. null: its default branch. Set a commit to keep a run reproducible."""
    streaming: bool = False
    """Read rows in file order as they are needed, in constant memory, for data too large to index. Rows are shuffled
    only within data.shuffle_buffer, and the run length must be given as train.max_steps."""
    format: DataFormat = "auto"
    """Schema of the rows. auto: recognised from the columns of the first row; a row is then rejected if a column that
    looks like part of the task (question, answer, label, choices, ...) would not be read. With a schema named here, other
    columns are left out; `check` and `train` list those with text."""
    columns: Annotated[dict[str, str], LAX] = {}
    """Maps field names of the schema to column names of the file, for example {answer: label, image: photo_path}.
    Fields that are not listed are read from the column of the same name, in upper or lower case."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row of this source is drawn, relative to rows of the other sources: with weight 2, twice per
    epoch. If any source is streamed, row counts are unknown and the weight is the source's relative share of all
    draws."""
    limit: Count | None = None
    """Use only the first N rows of the source. null: all rows."""
    image_root: InputPath | None = None
    """Folder that image paths in the rows are relative to; images outside it are refused. Relative to the recipe file; in
    an override, to the current directory. null: the folder that contains path."""


class AugmentationSection(Section):
    """Random augmentation of training images, drawn anew every time an image is used."""

    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest fraction of the image area that a random crop may keep. 1: no cropping."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of a left-right flip. Leave it at 0 for text in images, or if left and right matter."""
    color: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Maximum relative change of brightness, contrast and saturation: 0.2 is up to 20 percent. 0: no change."""


class CacheSection(Section):
    """A cache on disk of the frozen vision tower's output for each image, so that each image is encoded only once."""

    folder: SharedPath
    """Cache folder, relative to the current directory. Several runs may share it."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """dtype of the cached features. Freshly computed features are rounded to it as well, so that a run gives the same
    result with a cold and a warm cache."""
    max_gib: Annotated[float, Field(gt=0)] | None = None
    """Maximum size of the cache folder in GiB; images beyond it are encoded every time. null: no limit."""


class DataSection(Section):
    """Training and evaluation data, and how samples are turned into batches."""

    train: Annotated[tuple[DataSource, ...], LAX, Field(min_length=1)]
    """Sources of training samples."""
    eval: Annotated[tuple[DataSource, ...], LAX] = ()
    """Sources of held-out samples for evaluation. Empty: only what eval_fraction holds out, if set."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of each training source to hold out for evaluation. Rows that share an image, in any source, are kept
    on the same side. null: hold out nothing."""
    template: Literal["auto", "chat", "flamingo"] = "auto"
    """How a dialogue becomes text: with the language model's own chat template (chat), or in Flamingo's plain format
    (flamingo). auto: chat if the model has a template, else flamingo."""
    system_prompt: str | None = None
    """System message for every dialogue that has none of its own, in training and at inference. It is stored with the
    adapter."""
    max_text_tokens: Count | None = None
    """Maximum length of a sample in text tokens; data.too_long handles longer ones. Lower values save memory. null:
    the language model's context length."""
    too_long: Literal["error", "drop_sample", "drop_turns", "truncate_text"] = "error"
    """What to do with samples longer than data.max_text_tokens: stop with an error, leave the sample out
    (drop_sample), drop its last turns (drop_turns), or cut off its end (truncate_text). `flamingo-ft check` shows
    what each one costs."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What to do with a sample that cannot be used, such as a malformed row or an unreadable image: stop the run
    (error), or skip it and list it in left_out.jsonl (skip)."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """With on_bad_sample skip, the fraction of bad samples above which the run stops anyway."""
    allow_urls: bool = False
    """Whether images may be downloaded when a row gives a URL. Off by default, because training then depends on the
    network."""
    video_frames: Count = 8
    """Number of evenly spaced frames sampled from each video."""
    shuffle_buffer: Count = 1000
    """Number of rows of a streamed source held in memory, among which the next row is drawn at random. Larger shuffles
    better and takes more memory."""
    group_by_length: bool = False
    """Batch samples of similar length together, which reduces padding."""
    packing: bool = False
    """Concatenate several samples into one row of max_text_tokens tokens, without attention between them. Saves time
    when samples are much shorter than max_text_tokens."""
    augmentation: AugmentationSection | None = None
    """Random augmentation of training images. null: none."""
    cache: CacheSection | None = None
    """Cache of the vision tower's features on disk. null: encode every image every time."""


def contradictions_of_data(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    data = recipe.data
    for split, sources in (("train", data.train), ("eval", data.eval)):
        for index, source in enumerate(sources):
            yield from _contradictions_of_source(("data", split, index), source)
    if data.cache and data.augmentation:
        yield (
            ("data", "cache"),
            "tokens of an image that changes each time cannot be kept; drop the cache or augmentation",
        )
    if data.cache and recipe.lora.vision:
        yield (
            ("data", "cache"),
            "lora.vision changes the tower, so its tokens cannot be kept; set one of them to null",
        )
    if data.packing and data.max_text_tokens is None:
        yield (
            ("data", "packing"),
            "a row has to be of some length; set data.max_text_tokens, or packing to false",
        )
    if data.packing and data.group_by_length:
        yield (
            ("data", "group_by_length"),
            "packed rows are all of one length; set it or data.packing to false",
        )
    if data.eval_fraction and any(source.streaming for source in data.train):
        reason = "a share of a stream cannot be held out; name data.eval, or set streaming to false"
        yield ("data", "eval_fraction"), reason


def _contradictions_of_source(
    location: tuple[str | int, ...], source: DataSource
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if (source.path is None) == (source.hub is None):
        found = "neither path nor hub" if source.path is None else "both path and hub"
        yield location, f"found {found}; give one of them"
    for key in ("config", "revision"):
        if source.hub is None and getattr(source, key) is not None:
            yield (*location, key), "goes with hub, a dataset on the Hugging Face Hub; remove it"
