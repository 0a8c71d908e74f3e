"""Section ``data`` of a recipe: where samples come from and how they become batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from flamingo_ft.config.section import LAX, Count, InputPath, Section, SharedPath, one_of
from flamingo_ft.config.tables import DATASET_FORMATS

FORMATS = ("auto", *DATASET_FORMATS)


class DataSource(Section):
    """A source of samples: data files, a folder of images, or a dataset on the Hugging Face Hub."""

    path: InputPath | None = None
    """Data file (JSON, JSONL, CSV, TSV, Parquet, Arrow or a WebDataset tar), a pattern that matches several
    (`shards/*.tar`), or a folder of images. Relative to the recipe file; in an override, to the current
    directory. Set either path or hub."""
    hub: str | None = None
    """Dataset on the Hugging Face Hub, as org/name. Set either path or hub."""
    config: str | None = None
    """Configuration (subset) of the Hub dataset. null: its default."""
    data_files: str | None = None
    """The files of the Hub dataset to read: a name in it, or a pattern (`data/train-*.parquet`). Needed where
    a repository has files with different columns, as LLaVA-Instruct-150K. null: all files of the split."""
    split: str = "train"
    """Split of the Hub dataset, or of a dataset folder, to read."""
    revision: str | None = None
    """Branch, tag or commit of the Hub dataset. null: its default branch. Set a commit to keep a run
    reproducible."""
    streaming: bool = False
    """Read rows in file order as they are needed, in constant memory. For data too large to index: rows are
    shuffled only within data.shuffle_buffer, and the length of the run has to be given as train.max_steps."""
    format: Annotated[str, one_of(DATASET_FORMATS, "auto"), Field(json_schema_extra={"enum": [*FORMATS]})] = (
        "auto"
    )
    """Format of the rows. auto: recognized from the columns of the first row; a row is then rejected if a
    column that looks like part of the task (question, answer, label, choices, ...) would not be read. If a
    format is named, other columns are ignored; `check` and `train` list those that hold text."""
    columns: Annotated[dict[str, str], LAX] = {}
    """Maps fields of the format to columns of the file, for example {answer: label, image: photo_path}.
    Fields that are not listed are read from the column of the same name, in upper or lower case."""
    box_unit: Literal["pixels", "relative"] = "pixels"
    """Unit of the numbers in the column boxes: pixels of the upright image, or fractions of its width and
    height (relative)."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row of this source is drawn, relative to rows of the other sources: with weight 2, twice
    per epoch. If any source is streamed, numbers of rows are unknown, and the weight is the source's relative
    share of all draws."""
    limit: Count | None = None
    """Use only the first N rows of the source. null: all rows."""
    image_root: InputPath | None = None
    """Folder that image paths in the rows are relative to; images outside it are refused. Relative to the
    recipe file; in an override, to the current directory. null: the folder that contains path."""


class AugmentationSection(Section):
    """Random augmentation of training images, drawn anew every time an image is used."""

    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest fraction of the image's area that a random crop keeps. 1: no cropping. Lower it for photos of
    one object; leave it at 1 if what is asked about may be at the edge."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of a left-right flip. Leave it at 0 if images contain text, or if left and right matter."""
    color: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Maximum relative change of brightness, contrast and saturation; 0.2 is up to 20 percent. 0: no
    change."""


PixelsOrAuto = Annotated[
    Count | None,
    BeforeValidator(lambda value: None if value == "auto" else value),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}, {"type": "null"}]}),
]


class TilesSection(Section):
    """Tiles of large images: each is as large as the tower's input, so that the model sees details.

    The text still has one `<image>` for each image; an image has as many visual tokens as its views have in
    all. With a perceiver they are resampled into the same number of latents, without one the text attends to
    all of them. An image is resized to the whole grid of its tiles: nothing is cut off, and its shape may
    change. Small images stay one view.
    """

    max: Annotated[int, Field(ge=2)] = 6
    """Most tiles of one image. Of the grids with at most this many tiles, the one that preserves the most of
    the image's resolution is used. Time and memory of the tower grow with it, and without a perceiver those
    of cross-attention too."""
    size: PixelsOrAuto = None
    """Side in pixels of the part of an image that one tile shows, at the image's own resolution. null or
    `auto`: the side of the tower's input, so that nothing is scaled until max is reached. A smaller one
    enlarges the image."""
    thumbnail: bool = True
    """Also pass the whole image, scaled down, as one more view."""
    tags: Literal["learned", "text", "none"] = "learned"
    """How the model knows the place of a tile. learned: embeddings of its row and its column, and one of the
    whole image, are added to the tokens; they are trained with trainable.perceiver. text: every `<image>` is
    followed by max + 1 added tokens, one for each tile and one for the whole image, and each attends to its
    view alone, as in NVLM-X (arXiv:2409.11402); they are trained with trainable.new_tokens, and
    model.perceiver must be null. none: it does not, and tiles are an unordered set."""


class CacheSection(Section):
    """Cache on disk of the frozen vision tower's output, so that each image is encoded only once."""

    folder: SharedPath
    """Cache folder, relative to the current directory. Several runs may share it."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """dtype of the cached features. Newly computed features are rounded to it as well, so that a run gives
    the same result with a cold and a warm cache."""
    max_gib: Annotated[float, Field(gt=0)] | None = None
    """Maximum size of the cache folder in GiB. Images beyond it are encoded every time. null: no limit."""


class DataSection(Section):
    """Training and evaluation data, and how samples are turned into batches."""

    train: Annotated[tuple[DataSource, ...], LAX, Field(min_length=1)]
    """Sources of training samples."""
    eval: Annotated[tuple[DataSource, ...], LAX] = ()
    """Sources of held-out samples for evaluation. Empty: only those that eval_fraction holds out, if set."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of each training source that is held out for evaluation. Rows with the same image file,
    or copies of it, stay on the same side of the split, across all sources. null: nothing is held out."""
    template: Literal["auto", "chat", "flamingo"] = "auto"
    """How a dialogue becomes text: with the language model's own chat template (chat), or in Flamingo's plain
    format (flamingo). auto: chat if the model has a template, else flamingo."""
    system_prompt: str | None = None
    """System message for every dialogue that has none of its own, in training and at inference. It is stored
    with the adapter."""
    max_text_tokens: Count | None = None
    """Maximum length of a sample in text tokens; data.too_long decides what happens to longer ones. Lower it
    to save memory. null: the language model's context length."""
    too_long: Literal["error", "drop_sample", "drop_turns", "truncate_text"] = "error"
    """What to do with a sample longer than data.max_text_tokens: stop the run (error), leave the sample out
    (drop_sample), drop its last turns (drop_turns), or cut off its end (truncate_text). `flamingo-ft check`
    shows how much data each one loses."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What to do with a sample that cannot be used, such as a malformed row or an unreadable image: stop the
    run (error), or leave it out and list it in left_out.jsonl (skip)."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """With on_bad_sample skip, the fraction of bad samples above which the run stops anyway: a higher share
    usually means a mistake."""
    allow_urls: bool = False
    """Whether images are downloaded where a row gives a URL. Off by default, because training would depend on
    the network."""
    video_frames: Count = 8
    """Number of evenly spaced frames taken from each video. More frames show faster motion; time and memory
    grow with them."""
    shuffle_buffer: Count = 1000
    """Number of rows of a streamed source that are held in memory and drawn from at random. Larger values
    shuffle better and take more memory."""
    group_by_length: bool = False
    """Batch samples of similar length together, which saves padding and so time. Turn it on if lengths vary a
    lot."""
    packing: bool = False
    """Concatenate several samples into one row of max_text_tokens tokens, without attention between them.
    Saves time if samples are much shorter than max_text_tokens."""
    tiles: TilesSection | None = None
    """Divide large images into tiles, for small text, documents, charts and small things. null: every image
    is one view of the tower's size."""
    augmentation: AugmentationSection | None = None
    """Random augmentation of training images. null: none."""
    cache: CacheSection | None = None
    """Cache of the vision tower's output on disk. null: see auto_cache."""
    auto_cache: bool = True
    """Without cache, keep the tower's output in ~/.cache/flamingo_ft/tokens where that saves time and rounds
    nothing: in a run that computes in bf16, for two epochs or more, up to 20 GiB. A line at the start says
    so."""
