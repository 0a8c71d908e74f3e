"""What of a growing answer may be shown: nothing from a stop text on, and no blank around it."""

from __future__ import annotations

from collections.abc import Sequence


class VisibleText:
    """Takes an answer piece by piece and gives out what is certain to stay.

    What may be the beginning of a stop text is held back until the next piece decides. strip: leave out white space at
    both ends, as `flamingo-ft generate` does.
    """

    def __init__(self, stop: Sequence[str] = (), strip: bool = True):
        self._stop, self._strip = tuple(stop), strip
        self._pending = ""  # may be the beginning of a stop text
        self._blank = ""  # white space that counts only if something follows
        self._begun = not strip
        self.stopped = False

    def feed(self, piece: str) -> str:
        """What can be shown after ``piece``; nothing more once a stop text was found."""
        if self.stopped:
            return ""
        text = self._pending + piece
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text) - self._held(text)
        self._pending = "" if found else text[end:]
        return self._trimmed(text[:end])

    def end(self) -> str:
        """What was held back, of an answer that ends without a stop text."""
        text, self._pending = self._pending, ""
        return self._trimmed(text)

    def _held(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop text begins."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)

    def _trimmed(self, text: str) -> str:
        if not self._strip:
            return text
        text = self._blank + (text if self._begun else text.lstrip())
        shown = text.rstrip()
        self._begun = self._begun or bool(shown)
        self._blank = text[len(shown) :]
        return shown
