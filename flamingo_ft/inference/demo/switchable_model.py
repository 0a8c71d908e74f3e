"""A model that answers with its adapter or without it, and shows where an answer looks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from flamingo_ft.adapters.switched_off import switched_off
from flamingo_ft.inference.decoding import Decoding
from flamingo_ft.inference.look import Look
from flamingo_ft.inference.predictor import Predictor, refuse_beams, seeded
from flamingo_ft.inference.prompts import Prompt
from flamingo_ft.inference.streaming import stream_text


@dataclass(frozen=True)
class Answer:
    """An answer so far: its text and its tokens, without an end token.

    picture: path of the image with the answer's boxes, once it has ended with any.
    """

    text: str
    token_ids: tuple[int, ...]
    picture: str | None = None


class SwitchableModel:
    """A predictor and what its model is without the adapter. One question is answered at a time.

    bridge: `base_bridge` of the adapter; None for a model without one.
    """

    def __init__(self, predictor: Predictor, bridge: Mapping[str, Tensor] | None = None):
        self.predictor, self._bridge = predictor, bridge
        self._lock = threading.Lock()

    @property
    def has_adapter(self) -> bool:
        """Whether the model can also answer without its adapter."""
        return self._bridge is not None

    @property
    def has_perceiver(self) -> bool:
        """Whether visual tokens are resampled; otherwise the text attends to them directly."""
        return len(self.predictor.model.perceiver.layers) > 0

    @property
    def layers(self) -> list[int]:
        """The decoder layers that follow a gated cross-attention block."""
        blocks = self.predictor.model.gated_cross_attn_layers
        return [index for index, block in enumerate(blocks) if block is not None]

    def check(self, prompt: Prompt, decoding: Decoding) -> None:
        """Raise UserError for a prompt that is too long and for options that cannot be streamed."""
        refuse_beams(decoding)
        self.predictor.encode([prompt])

    def stream(self, prompt: Prompt, decoding: Decoding, adapter: bool = True) -> Generator[Answer]:
        """Yield the answer as it grows. Closing the generator ends it.

        The adapter is switched off and on again in the thread that generates, so that a visitor who leaves in
        the middle of an answer leaves the model as it was.
        """
        predictor = self.predictor
        (ids,), media = predictor.encode([prompt]), predictor.media.of([prompt])

        def run(put: Callable[[Answer], None], is_cancelled: Callable[[], bool]) -> None:
            pieces: list[str] = []

            def show(piece: str) -> None:
                if piece:
                    pieces.append(piece)
                    put(Answer("".join(pieces), tuple(receiver.ids)))

            receiver = predictor.receiver(decoding, show, is_cancelled)
            with self._lock, self._switched(adapter), predictor.evaluation_mode(), seeded(decoding):
                predictor.generate([ids], media, decoding, receiver)
            receiver.finish()
            put(Answer("".join(pieces), tuple(receiver.ids)))  # with the tokens that add no text

        return stream_text(run)

    def look(self, prompt: Prompt, answer: Answer) -> Look:
        """Return where an answer looks that was given with the adapter."""
        with self._lock:
            return self.predictor.look_at(prompt, answer.token_ids)

    @contextmanager
    def _switched(self, adapter: bool) -> Generator[None]:
        if adapter or self._bridge is None:
            yield
            return
        with switched_off(self.predictor.model, self._bridge):
            yield
