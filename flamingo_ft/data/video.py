"""Frames out of a video file, by PyAV."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from flamingo_ft.errors import UserError

# Containers of videos. FFmpeg knows others that are lists of files to open, local ones and on the network.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,ogg,flv,asf"


def even_positions(total: int, wanted: int) -> list[int]:
    """``wanted`` numbers below ``total``, each in the middle of an equal part; all of them where there are fewer."""
    if total <= wanted:
        return list(range(total))
    return [int((index + 0.5) * total / wanted) for index in range(wanted)]


def read_frames(file: str | Path | bytes, wanted: int, where: str) -> list[Image.Image]:
    """``wanted`` evenly spaced frames as upright RGB, or all of a shorter video. UserError for what is no video."""
    av = _pyav(where)
    try:
        total = _claimed_frames(av, file)
        frames = _frames_at(av, file, even_positions(total, wanted))
        if len(frames) < min(total, wanted) or not total:  # the file's own number is missing or wrong
            frames = _frames_at(av, file, even_positions(_count_frames(av, file), wanted))
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: not a readable video ({reason}); replace it") from None
    if not frames:
        raise UserError(f"{where}: not a readable video (no frame in it); replace it")
    return frames


def _pyav(where: str) -> ModuleType:
    try:
        return import_module("av")
    except ImportError:
        raise UserError(f"{where}: a video file needs PyAV; pip install av, or give the frames as a list") from None


def _open(av: ModuleType, file: str | Path | bytes) -> Any:
    content = io.BytesIO(file) if isinstance(file, bytes) else str(file)
    return av.open(content, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})


def _claimed_frames(av: ModuleType, file: str | Path | bytes) -> int:
    with _open(av, file) as container:
        return container.streams.video[0].frames


def _count_frames(av: ModuleType, file: str | Path | bytes) -> int:
    with _open(av, file) as container:
        return sum(1 for _ in container.decode(video=0))


def _frames_at(av: ModuleType, file: str | Path | bytes, positions: Sequence[int]) -> list[Image.Image]:
    wanted, frames = set(positions), []
    with _open(av, file) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                # FFmpeg counts a turn to the left as positive, as Pillow does.
                frames.append(frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True))
            if len(frames) == len(wanted):
                break
    return frames
