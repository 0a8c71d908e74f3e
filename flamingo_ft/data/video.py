"""Frames of a video file, read with PyAV."""

from __future__ import annotations

import io
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.model import images

# Containers of videos. FFmpeg knows others that are lists of files to open, local ones and on the network.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,ogg,flv,asf"


def even_positions(total: int, count: int) -> list[int]:
    """Return the midpoints of ``count`` equal segments of ``total``, or every index if there are fewer."""
    if total <= count:
        return list(range(total))
    return [int((index + 0.5) * total / count) for index in range(count)]


def read_frames(file: str | Path | bytes, count: int, where: str) -> dict[int, Image.Image]:
    """Return ``count`` evenly spaced frames, or all of a shorter video, as upright RGB, keyed by frame index.

    Raises UserError for a file that is not a video, and without PyAV.
    """
    av = _pyav(where)
    with _video_errors(av, where):
        positions = even_positions(_claimed_frames(av, file), count)
        frames = _frames_at(av, file, positions)
        if len(frames) < len(positions) or not positions:  # the file's own number is missing or wrong
            frames = _frames_at(av, file, even_positions(_count_frames(av, file), count))
    if not frames:
        raise UserError(f"{where}: not a readable video (no frame in it); replace it")
    return frames


def frame_positions(file: str | Path | bytes, count: int, where: str) -> list[int]:
    """Return the numbers of the frames of `read_frames`; empty if the file does not state how many it has."""
    av = _pyav(where)
    with _video_errors(av, where):
        return even_positions(_claimed_frames(av, file), count)


@contextmanager
def _video_errors(av: ModuleType, where: str) -> Generator[None]:
    try:
        yield
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        reason = error_message(error, None)
        raise UserError(f"{where}: not a readable video ({reason}); replace it") from None


def _pyav(where: str) -> ModuleType:
    try:
        import av  # an optional dependency
    except ImportError:
        raise UserError(
            f"{where}: a video file needs PyAV; pip install av, or give the frames as a list"
        ) from None
    return av


def _open(av: ModuleType, file: str | Path | bytes) -> Any:
    content = io.BytesIO(file) if isinstance(file, bytes) else str(file)
    return av.open(content, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})


def _claimed_frames(av: ModuleType, file: str | Path | bytes) -> int:
    """Return how many frames the file says it has; 0 if it does not."""
    with _open(av, file) as container:
        stream = container.streams.video[0]
        if stream.codec_context is not None:  # None for a codec that this FFmpeg lacks; decoding raises then
            images.check_size(stream.codec_context.width, stream.codec_context.height)
        return stream.frames


def _count_frames(av: ModuleType, file: str | Path | bytes) -> int:
    with _open(av, file) as container:
        return sum(1 for _ in container.decode(video=0))


def _frames_at(av: ModuleType, file: str | Path | bytes, positions: Sequence[int]) -> dict[int, Image.Image]:
    needed = {*positions}
    frames: dict[int, Image.Image] = {}
    with _open(av, file) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in needed:
                frames[number] = _picture(frame)
            if len(frames) == len(needed):
                break
    return frames


def _picture(frame: Any) -> Image.Image:
    """Return a decoded frame as upright RGB, transparent parts over white as in images."""
    images.check_size(frame.width, frame.height)
    layout = frame.format
    is_transparent = layout.has_palette or any(component.is_alpha for component in layout.components)
    picture = Image.fromarray(frame.to_ndarray(format="rgba")) if is_transparent else frame.to_image()
    # FFmpeg counts a turn to the left as positive, as Pillow does.
    return images.to_rgb(picture).rotate(getattr(frame, "rotation", 0), expand=True)
