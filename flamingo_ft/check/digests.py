"""Numbers that tell contents apart: 64 bits, the same for two of a million with a chance of 3 in 100 million."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from flamingo_ft.data import open_medium
from flamingo_ft.data.sample import Medium, Sample
from flamingo_ft.errors import UserError
from flamingo_ft.model.images import conversions

REMEMBERED = 4096  # files


@dataclass(frozen=True)
class Picture:
    """A decoded image or video. digest: of its pixels, the same for the same picture in another file.

    conversions: what the reader did to it or to any of its frames, names of `images.CONVERSIONS`.
    """

    digest: int
    conversions: tuple[str, ...]


class Pictures:
    """Decodes media, and remembers what came of the last files: rows of a data set often share one."""

    def __init__(self, video_frames: int):
        self.video_frames = video_frames
        self._known: dict[str, Picture | str] = {}

    def look_at(self, medium: Medium) -> Picture:
        """Decode it. UserError where it cannot be read."""
        if not isinstance(medium, str):
            return self._look_at(medium)
        found = self._known.get(medium)
        if found is None:
            found = self._outcome(medium)
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[medium] = found
        if isinstance(found, str):
            raise UserError(found)
        return found

    def _outcome(self, medium: str) -> Picture | str:
        try:
            return self._look_at(medium)
        except UserError as error:
            return str(error)

    def _look_at(self, medium: Medium) -> Picture:
        frames = open_medium(medium, video_frames=self.video_frames)
        parts = (part for frame in frames for part in (str(frame.size).encode(), frame.tobytes()))
        done = dict.fromkeys(name for frame in frames for name in conversions(frame))
        return Picture(digest(parts), tuple(done))


def sample_digest(sample: Sample, pictures: Iterable[int]) -> int:
    """Of all that is learned from: words, pictures and where they stand."""
    text = json.dumps([sample.messages, sample.rejected, [*pictures]], sort_keys=True)
    return digest([text.encode("utf-8", "surrogatepass")])


def digest(parts: Iterable[bytes]) -> int:
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part)
    return int.from_bytes(state.digest(), "little")
