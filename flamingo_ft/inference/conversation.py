"""A dialogue with a model, turn by turn; what it has read already is not read again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import takewhile
from typing import Any, cast

from torch import Tensor

from flamingo_ft.data.sample import text_message
from flamingo_ft.model.conditioning import cache_length
from flamingo_ft.model.language_model_inputs import CANNOT_CONTINUE_CACHE, get_cache

from .predictor import Predictor, refuse_beams, seeded
from .prompts import Prompt, as_list, place_images
from .streaming import stream_text


class Conversation:
    """The turns of a dialogue so far. options: see `Decoding`; system: text of a system message.

    After each turn the key/value cache is kept, and the next turn reads only the tokens that follow those
    that both texts begin with. A language model that cannot continue from a cache, such as Mamba 2, reads the
    whole dialogue again.
    """

    def __init__(self, predictor: Predictor, system: str | None = None, **options: Any):
        self.predictor, self.decoding = predictor, predictor.decoding.updated(**options)
        refuse_beams(self.decoding)
        self._beginning = [] if system is None else [text_message("system", system)]
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the system message alone."""
        self.messages: list[dict[str, Any]] = list(self._beginning)
        self.images: list[Any] = []
        self._read = _Read()

    @property
    def turns(self) -> int:
        """Number of questions, each with its answer."""
        return sum(message["role"] == "user" for message in self.messages)

    def undo(self) -> bool:
        """Remove the last question, its images and its answer. Return False if there is none."""
        if not self.turns:
            return False
        question = self.messages[-2]
        images = sum(block["type"] == "image" for block in question["content"])
        del self.messages[-2:]
        del self.images[len(self.images) - images :]
        return True

    def ask(self, text: str, images: Any = None) -> str:
        """Return the answer to the next question; see `stream`."""
        return "".join(self.stream(text, images))

    def stream(self, text: str, images: Any = None) -> Generator[str]:
        """Ask the next question and yield the answer piece by piece.

        images: as in `Predictor.__call__`. Closing the generator, or Ctrl-C, ends the answer there; what came
        so far is kept. After an error, or without any text, the question is not part of the dialogue. Raises
        UserError as `Predictor.__call__` does.
        """
        images = as_list(images)
        question = {"role": "user", "content": place_images(text, len(images))}
        prompt = Prompt([*self.messages, question], [*self.images, *images])
        (ids,) = self.predictor.encode([prompt])
        return self._keeping(prompt, stream_text(self._generation(prompt, ids)))

    def row(self) -> dict[str, Any]:
        """Return the dialogue as a row of the ``messages`` format, for a file to train on or to read again.

        Its ``images`` are those that were given.
        """
        return {"messages": self.messages, "images": self.images}

    def _keeping(self, prompt: Prompt, pieces: Iterator[str]) -> Generator[str]:
        """Yield the pieces of an answer; then make question and answer part of the dialogue."""
        answer = ""
        try:
            for piece in pieces:
                answer += piece
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            pieces.close()  # pyrefly: ignore[missing-attribute]
            self._keep(prompt, answer)
            raise
        self._keep(prompt, answer)

    def _keep(self, prompt: Prompt, answer: str) -> None:
        if answer:
            self.messages = [*prompt.messages, text_message("assistant", answer)]
            self.images = list(prompt.images)

    def _generation(
        self, prompt: Prompt, ids: list[int]
    ) -> Callable[[Callable[[str], None], Callable[[], bool]], None]:
        """Return the function that generates the answer, for `stream_text`."""

        def run(on_text: Callable[[str], None], is_cancelled: Callable[[], bool]) -> None:
            receiver = self.predictor.receiver(self.decoding, on_text, is_cancelled)
            read, self._read = self._read, _Read()  # after an error, the cache is in an unknown state
            image_token_id = cast(int, self.predictor.processor.image_token_id)
            cache, length = read.shared_with(ids, prompt.images, image_token_id)
            seen = ids[:length].count(image_token_id)
            media = self._media(Prompt(prompt.messages, prompt.images[seen:], prompt.where))
            with self.predictor.evaluation_mode(), seeded(self.decoding):
                output = self.predictor.generate(
                    [ids], media, self.decoding, receiver, cache=cache, return_dict_in_generate=True
                )
            if self.predictor.model.lang_encoder.config.model_type not in CANNOT_CONTINUE_CACHE:
                self._read = _Read.after(output, prompt.images)
            receiver.finish()

        return run

    def _media(self, prompt: Prompt) -> dict[str, Tensor]:
        return self.predictor.media.of([prompt])


class _Read:
    """What the model has read: a key/value cache, the token ids in it, and their images."""

    def __init__(self, cache: Any = None, ids: Sequence[int] = (), images: Sequence[Any] = ()):
        self._cache, self._ids, self._images = cache, ids, images

    @classmethod
    def after(cls, output: Any, images: Sequence[Any]) -> _Read:
        """Return what was read in a generation that has ended: all but the last token."""
        cache = get_cache(output)
        return cls(cache, output.sequences[0, : cache_length(cache)].tolist(), images)

    def shared_with(self, ids: list[int], images: Sequence[Any], image_token_id: int) -> tuple[Any, int]:
        """Return the cache cut to what ``ids`` and their ``images`` begin with, and its number of tokens.

        None if that is nothing. At least one token is left to read.
        """
        same_images = _shared(self._images, images, lambda ours, theirs: ours is theirs or ours == theirs)
        shared = _shared(self._ids, ids[:-1], int.__eq__)
        places = [place for place, token in enumerate(ids[:shared]) if token == image_token_id]
        if len(places) > same_images:
            shared = places[same_images]
        if not shared:
            return None, 0
        if shared < len(self._ids):
            if not hasattr(self._cache, "crop"):
                return None, 0
            try:
                self._cache.crop(shared - len(self._ids))
            except RuntimeError:  # a sliding window or a recurrent state has dropped what came before
                return None, 0
        return self._cache, shared


def _shared(first: Sequence[Any], second: Sequence[Any], same: Callable[[Any, Any], bool]) -> int:
    """Return how many items two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: same(*pair), zip(first, second, strict=False)))
