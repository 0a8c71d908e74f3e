"""The ``data`` section of a recipe: where samples come from and what is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from flamingo_ft.config.section import LAX, Count, FilePath, Section

if TYPE_CHECKING:
    from flamingo_ft.config.schema import Recipe

DataFormat = Literal[
    "auto",
    "messages",
    "llava",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "vqa",
    "caption",
    "mimicit",
    "interleaved",
    "preference",
]


class DataSource(Section):
    """Samples with their images: files, a folder of images, or a dataset on the Hub."""

    path: FilePath | None = None
    """File of samples (JSON, JSONL, CSV, TSV, Parquet, Arrow, a tar of a WebDataset), a pattern of such files
    (`shards/*.tar`), or a folder of images; relative to the recipe."""
    hub: str | None = None
    """A dataset on the Hugging Face Hub, org/name, in place of a path."""
    config: str | None = None
    """Configuration of the dataset on the Hub."""
    split: str = "train"
    """Split of the dataset on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the dataset on the Hub. null: the default branch."""
    streaming: bool = False
    """Read the rows in order, as they are needed, in constant memory; shuffled only within data.shuffle_buffer."""
    format: DataFormat = "auto"
    """Schema of the samples. auto: recognised from the columns of the first row; a row is then rejected if a column
    that looks like part of the task (question, answer, label, choices, ...) would not be read. With a schema named
    here, other columns are left out; `check` and `train` list those with text."""
    columns: Annotated[dict[str, str], LAX] = {}
    """Where a schema's fields stand: {answer: label, image: photo_path}. Fields not named are under their own names, in
    upper or lower case."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often a row of this source is shown, relative to the rows of the other sources. Where any source is streamed:
    this source's share of the rows shown, relative to the other sources."""
    limit: Count | None = None
    """Only the first so many rows. null: all."""
    image_root: FilePath | None = None
    """Folder that the samples' image paths start from and must stay in, relative to the recipe. null: the folder of
    `path`."""


class AugmentationSection(Section):
    """Random changes to training images, drawn anew each time that an image is shown."""

    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest share of the image's area that a random crop keeps. 1: no crop."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance of a left-right flip. Not for images with text or with sides that matter."""
    color: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest relative change of brightness, contrast and saturation."""


class CacheSection(Section):
    """The frozen tower's tokens of every image, kept on disk, so that each image is encoded once."""

    folder: FilePath
    """Folder of the cache, relative to the current directory. Several runs may share it."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number format that tokens are rounded to, stored or fresh."""
    max_gib: Annotated[float, Field(gt=0)] | None = None
    """Size that the folder is not filled beyond, in GiB. null: no limit."""


class DataSection(Section):
    """What is learned from, and what is never trained on."""

    train: Annotated[tuple[DataSource, ...], LAX, Field(min_length=1)]
    """Sources of the training samples."""
    eval: Annotated[tuple[DataSource, ...], LAX] = ()
    """Sources of the held-out samples. Empty: none but those of `eval_fraction`."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of each source's rows that is held out instead of trained on; rows with the same images, in whichever source,
    stay together."""
    template: Literal["auto", "chat", "flamingo"] = "auto"
    """How a dialogue is written as text: the language model's chat template (chat), Flamingo's own form (flamingo).
    auto: the first where there is one."""
    system_prompt: str | None = None
    """Put before every dialogue that has no system message of its own, in training and afterwards."""
    max_text_tokens: Count | None = None
    """Longest sample in text tokens. null: the language model's context."""
    too_long: Literal["error", "drop_sample", "drop_turns", "truncate_text"] = "error"
    """What becomes of a longer one: drop_turns takes away its last turns, truncate_text its last words."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What becomes of a sample that cannot be used: end the run, or leave it out and tell in the end."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of samples left out above which a run that skips them ends all the same."""
    allow_urls: bool = False
    """Fetch images whose path is a URL."""
    video_frames: Count = 8
    """Frames taken from a video, evenly spaced."""
    shuffle_buffer: Count = 1000
    """Rows of a streamed source among which the next one is drawn."""
    group_by_length: bool = False
    """Put samples of like length into a batch: less padding."""
    packing: bool = False
    """Lay several samples end to end in one row of max_text_tokens, each blind to the others."""
    augmentation: AugmentationSection | None = None
    """Random changes to training images. null: none."""
    cache: CacheSection | None = None
    """Keep the frozen tower's tokens on disk. null: encode every image each time."""


def contradictions_of_data(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    data = recipe.data
    for split, sources in (("train", data.train), ("eval", data.eval)):
        for index, source in enumerate(sources):
            yield from _contradictions_of_source(("data", split, index), source)
    if data.cache and data.augmentation:
        yield ("data", "cache"), "tokens of an image that changes each time cannot be kept; drop the cache or augmentation"
    if data.cache and recipe.lora.vision:
        yield ("data", "cache"), "lora.vision changes the tower, so its tokens cannot be kept; set one of them to null"
    if data.packing and data.max_text_tokens is None:
        yield ("data", "packing"), "a row has to be of some length; set data.max_text_tokens, or packing to false"
    if data.packing and data.group_by_length:
        yield ("data", "group_by_length"), "packed rows are all of one length; set it or data.packing to false"
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
