"""Frames out of a video file, by PyAV."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.model import images

# Containers of videos. FFmpeg knows others that are lists of files to open, local ones and on the network.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,ogg,flv,asf"


def even_positions(total: int, wanted: int) -> list[int]:
    """``wanted`` numbers below ``total``, each in the middle of an equal part; all of them where there are fewer."""
    if total <= wanted:
        return list(range(total))
    return [int((index + 0.5) * total / wanted) for index in range(wanted)]


def read_frames(file: str | Path | bytes, wanted: int, where: str) -> dict[int, Image.Image]:
    """``wanted`` evenly spaced frames as upright RGB, by their number in the video, or all of a video with fewer.

    Raises UserError for a file that is no video, and without PyAV.
    """
    av = _pyav(where)
    with _readable(av, where):
        positions = even_positions(_claimed_frames(av, file), wanted)
        frames = _frames_at(av, file, positions)
        if len(frames) < len(positions) or not positions:  # the file's own number is missing or wrong
            frames = _frames_at(av, file, even_positions(_count_frames(av, file), wanted))
    if not frames:
        raise UserError(f"{where}: not a readable video (no frame in it); replace it")
    return frames


def frame_positions(file: str | Path | bytes, wanted: int, where: str) -> list[int]:
    """The numbers of the frames that `read_frames` gives, where the file tells how many it has; else none."""
    av = _pyav(where)
    with _readable(av, where):
        return even_positions(_claimed_frames(av, file), wanted)


@contextmanager
def _readable(av: ModuleType, where: str) -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        reason = error_message(error, None)
        raise UserError(f"{where}: not a readable video ({reason}); replace it") from None


def _pyav(where: str) -> ModuleType:
    try:
        return import_module("av")
    except ImportError:
        raise UserError(
            f"{where}: a video file needs PyAV; pip install av, or give the frames as a list"
        ) from None


def _open(av: ModuleType, file: str | Path | bytes) -> Any:
    content = io.BytesIO(file) if isinstance(file, bytes) else str(file)
    return av.open(content, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})


def _claimed_frames(av: ModuleType, file: str | Path | bytes) -> int:
    with _open(av, file) as container:
        stream = container.streams.video[0]
        if stream.codec_context is not None:  # None for a codec that this FFmpeg lacks; decoding tells of it
            images.check_size(stream.codec_context.width, stream.codec_context.height)
        return stream.frames


def _count_frames(av: ModuleType, file: str | Path | bytes) -> int:
    with _open(av, file) as container:
        return sum(1 for _ in container.decode(video=0))


def _frames_at(av: ModuleType, file: str | Path | bytes, positions: Sequence[int]) -> dict[int, Image.Image]:
    wanted, frames = set(positions), {}
    with _open(av, file) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                frames[number] = _picture(frame)
            if len(frames) == len(wanted):
                break
    return frames


def _picture(frame: Any) -> Image.Image:
    """A decoded frame as upright RGB, transparent parts over white as those of an image."""
    images.check_size(frame.width, frame.height)
    layout = frame.format
    transparent = layout.has_palette or any(component.is_alpha for component in layout.components)
    picture = Image.fromarray(frame.to_ndarray(format="rgba")) if transparent else frame.to_image()
    # FFmpeg counts a turn to the left as positive, as Pillow does.
    return images.to_rgb(picture).rotate(getattr(frame, "rotation", 0), expand=True)
