"""check.html: one self-contained page, with histograms and the first samples token by token."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from flamingo_ft.data import Sample, open_medium
from flamingo_ft.data.box_writer import BoxWriter
from flamingo_ft.data.boxes import boxes_on
from flamingo_ft.data.drawing import REFERENCE, DrawnBox, draw_boxes
from flamingo_ft.data.encode import IGNORED
from flamingo_ft.data.sample import Video
from flamingo_ft.data.sample_order import WeightedSource
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import data_uri, percent
from flamingo_ft.model import FlamingoImageProcessor, FlamingoProcessor
from flamingo_ft.model.geometry import ImageGeometry
from flamingo_ft.model.images import CONVERSIONS
from flamingo_ft.model.tiles import UNTILED
from flamingo_ft.templates import load_template
from flamingo_ft.version import __version__

from .check_report import CheckReport, Distribution
from .row_inspector import Problem, Row, rows_of
from .text_checks import TextInspector, texts_of

PAGE_FILE = "check.html"
INK, BLUE, RED = "#24292f", "#1f5fa8", "#c0272d"
FIGURE_SIZE, DPI = (4.2, 2.7), 160  # inches, dots per inch
PREVIEWED_SAMPLES = 4  # of each source
MAX_ROWS_TRIED = 200  # to find usable samples
MAX_TOKENS, MAX_MEDIA = 600, 12  # shown of a sample
THUMBNAIL_SIDE, LOSSLESS_SIDE = 160, 64  # pixels; images up to LOSSLESS_SIDE are shown pixel by pixel
WHOLE = 0.98  # share of a picture from which on it counts as seen whole: crops are in whole pixels
REPLACEMENT = "\ufffd"  # what a tokenizer decodes the first bytes of an incomplete character to


def write_page(
    folder: Path,
    report: CheckReport,
    problems: Iterable[Problem],
    previews: Sequence[Sequence[SamplePreview]],
    histograms: Mapping[str, Path],
) -> None:
    """Write check.html to ``folder``.

    All text is escaped, and the page's content security policy forbids scripts.

    Args:
        problems: all of them; streamed into the page.
        previews: the first samples of each source.
        histograms: PNG files, which are embedded.
    """
    template = load_template("check/check.html.jinja", trim_blocks=True, lstrip_blocks=True)
    page = template.stream(
        version=__version__,
        findings=report,
        problems=problems,
        shown=[(part, samples) for part, samples in zip(report.parts, previews, strict=True) if samples],
        figures={name: data_uri(path.read_bytes()) for name, path in histograms.items()},
        percent=percent,
        conversions=_conversion_rows(report),
        short=_path_shortener(report),
    )
    page.enable_buffering(64)
    with open(folder / PAGE_FILE, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(page)


def _conversion_rows(report: CheckReport) -> list[tuple[str, str, list[int]]]:
    """Return each conversion that was applied: name, description, count by source."""
    rows = []
    for name, description in CONVERSIONS.items():
        counts = [part.conversions.get(name, 0) for part in report.parts]
        if any(counts):
            rows.append((name, description, counts))
    return rows


def _path_shortener(report: CheckReport) -> Callable[[str], str]:
    """Return a function that removes the folder common to all sources, unless some are on the Hub."""
    folders = [os.path.dirname(part.name) for part in report.parts]
    common = os.path.commonpath(folders) + os.sep if all(map(os.path.isabs, folders)) else ""
    return lambda path: path.removeprefix(common)


# --- histograms ---


def save_histograms(report: CheckReport, folder: Path) -> Mapping[str, Path]:
    """Write text_tokens.png, images.png and loss_share.png to ``folder``; return their paths by name."""
    figures = {
        "text_tokens": _token_histogram(report.distributions["text_tokens"], report.too_long.limit),
        "images": _image_histogram(report.distributions["images"]),
        "loss_share": _loss_share_histogram(report.distributions["loss_share"]),
    }
    paths = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        figure.savefig(paths[name], dpi=DPI)
    return paths


def _token_histogram(tokens: Distribution, limit: int) -> Figure:
    """Text tokens per sample, with the median, and the limit if it is near."""
    figure, axes = _histogram("Text tokens of a sample", tokens)
    axes.set_xlabel("text tokens")
    axes.axvline(tokens.median, color=INK, linewidth=1, linestyle=":")
    _label_line(axes, f" median {tokens.median:,.0f}", (tokens.median, 1), color=INK)
    if limit <= 1.5 * tokens.most:
        axes.axvline(limit, color=RED, linewidth=1)
        _label_line(axes, f"limit {limit:,} ", (limit, 0.9), color=RED, ha="right")
    return figure


def _image_histogram(images: Distribution) -> Figure:
    figure, axes = _histogram("Images and videos of a sample", images)
    axes.set_xlabel("images and videos")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _loss_share_histogram(share: Distribution) -> Figure:
    figure, axes = _histogram("Share of tokens in the loss", share)
    axes.set(xlabel="tokens in the loss, of all of a sample", xlim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _label_line(axes: Axes, text: str, position: tuple[float, float], **style: Any) -> None:
    """Annotate a vertical line. position: in tokens, and in 0..1 of the axes' height."""
    axes.annotate(text, position, xycoords=("data", "axes fraction"), va="top", fontsize=8, **style)


def _histogram(title: str, values: Distribution) -> tuple[Figure, Axes]:
    """Draw a histogram without pyplot, whose global state is not thread-safe."""
    figure = Figure(figsize=FIGURE_SIZE, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.stairs(values.counts, values.edges, fill=True, color=BLUE)
    axes.set_title(title, loc="left", color=INK)
    axes.set_ylabel("samples")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


# --- the first samples ---


@dataclass(frozen=True)
class TokenPreview:
    """A token as shown on the page.

    Attributes:
        text: what it adds to the text before it; empty for all but the last token of a character.
        name: its entry in the vocabulary.
        learned: it is in the loss.
        media: it is the image token.
        special: it is a special or added token.
    """

    id: int
    text: str
    name: str
    learned: bool
    media: bool
    special: bool


@dataclass(frozen=True)
class MediumPreview:
    """Thumbnails as data URIs: one of an image, one per frame of a video.

    note: how the model gets it, if not as one image. exact: not scaled down.
    """

    uris: list[str]
    note: str
    exact: bool


@dataclass(frozen=True)
class SamplePreview:
    """A sample as it trains; of a preference pair both texts, one after the other.

    more_tokens, more_pictures: how many are left out. boxes: how many it has.
    """

    where: str
    task: str
    tokens: list[TokenPreview]
    pictures: list[MediumPreview]
    text_tokens: int
    label_tokens: int
    more_tokens: int
    more_pictures: int
    boxes: int


def preview_samples(index: int, source: WeightedSource, inspector: TextInspector) -> list[SamplePreview]:
    """Return previews of the first usable samples of the source at ``index``."""
    previews: list[SamplePreview] = []
    for tried, row in enumerate(rows_of(index, source)):
        if tried == MAX_ROWS_TRIED or len(previews) == PREVIEWED_SAMPLES:
            break
        try:
            preview = _preview(source, row, inspector)
        except UserError:
            continue
        if preview is not None:
            previews.append(preview)
    return previews


def _preview(source: WeightedSource, row: Row, inspector: TextInspector) -> SamplePreview | None:
    """Return a preview of a row, or None if it is not trained on. Raises UserError if it cannot be read."""
    if row.failure is not None:
        return None
    raw = source.source.raw(row.number) if row.raw is None else row.raw
    sample = BoxWriter(inspector.processor.image_processor)(source.source.sample(row.number, raw))
    encoded = inspector(sample).encoded
    if encoded is None:
        return None
    images = inspector.processor.image_processor
    media = [_preview_medium(sample, number, images) for number in range(encoded.images)]
    tokens = [
        token
        for text in texts_of(encoded)
        for token in token_previews(inspector.processor, text.input_ids, text.labels)
    ]
    return SamplePreview(
        sample.where,
        sample.task,
        tokens[:MAX_TOKENS],
        media[:MAX_MEDIA],
        text_tokens=len(tokens),
        label_tokens=sum(token.learned for token in tokens),
        more_tokens=max(0, len(tokens) - MAX_TOKENS),
        more_pictures=max(0, len(media) - MAX_MEDIA),
        boxes=len(sample.boxes),
    )


def _preview_medium(sample: Sample, number: int, images: FlamingoImageProcessor) -> MediumPreview:
    """Return a preview of one of a sample's media, with its boxes."""
    medium = sample.images[number]
    frames = open_medium(medium, video_frames=images.video_frames)
    exact = max(frames[0].size) <= LOSSLESS_SIDE
    note = "video" if isinstance(medium, Video) else _view_note(images, frames[0])
    boxes = [(box.pixels(*frames[0].size), REFERENCE) for box in boxes_on(sample, number)]
    return MediumPreview([_thumbnail(frame, boxes) for frame in frames], note, exact and not boxes)


def _view_note(images: FlamingoImageProcessor, picture: Image.Image) -> str:
    """Return the tiles of a picture, or how much of it a tower that crops sees."""
    rows, columns = grid = images.grid_of(picture)
    if grid != UNTILED:
        return f"{rows} x {columns} tiles"
    geometry = images.geometry(ImageGeometry.of(*picture.size))
    share = geometry.visible_area((0, 0, *picture.size)) / (picture.width * picture.height)
    return "" if share > WHOLE else f"the model sees the middle {percent(share, digits=0)}"


def _thumbnail(image: Image.Image, boxes: Sequence[DrawnBox]) -> str:
    """Return a small image as a PNG, a larger one scaled down as a JPEG, as a data URI."""
    size, file_format = image.size, "PNG" if max(image.size) <= LOSSLESS_SIDE else "JPEG"
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image = draw_boxes(image, boxes, size) if boxes else image
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return data_uri(buffer.getvalue(), f"image/{file_format.lower()}")


def token_previews(
    processor: FlamingoProcessor, input_ids: Sequence[int], labels: Sequence[int]
) -> list[TokenPreview]:
    """Return all tokens of a sample, special ones included; their texts together are the decoded sample."""
    tokenizer = processor.tokenizer
    names = tokenizer.convert_ids_to_tokens(input_ids)
    texts = _token_texts(processor, input_ids)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [
        TokenPreview(
            token, text, str(name), label != IGNORED, token == processor.image_token_id, token in special
        )
        for token, text, name, label in zip(input_ids, texts, names, labels, strict=True)
    ]


def _token_texts(processor: FlamingoProcessor, ids: Sequence[int]) -> Iterator[str]:
    """Yield what each token adds to the text.

    Tokens are decoded together with the previous one, because some tokenizers drop the space of a lone token.
    """
    begin = done = 0
    for end in range(1, len(ids) + 1):
        before, through = _decode(processor, ids[begin:done]), _decode(processor, ids[begin:end])
        if through.endswith(REPLACEMENT) and end < len(ids):
            yield ""
            continue
        yield through[len(before) :]
        begin, done = done, end


def _decode(processor: FlamingoProcessor, ids: Sequence[int]) -> str:
    return processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
