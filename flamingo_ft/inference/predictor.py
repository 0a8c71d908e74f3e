"""A loaded model that answers questions about images, as often as it is asked.

    predictor = Predictor.from_pretrained("runs/quickstart")
    predictor("photo.png", "What is this?")
    predictor.batch([("a.png", "What is this?"), (["a.png", "b.png"], "Is <image> larger than <image>?")])
    for piece in predictor.stream("photo.png", "What is this?", temperature=0.7):
        print(piece, end="")
    predictor.look("photo.png", "What is this?").figure()
    predictor.boxes_in(predictor("photo.png", "Where is the dog?"), "photo.png")  # in pixels

Commands, notebooks, evaluation and training all ask through it. Answers are greedy unless `Decoding` says
otherwise. A prompt unlike all training samples, such as one without an image, is answered and logged as a
warning, once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from flamingo_ft.adapters import load_trained
from flamingo_ft.adapters.answering import end_token_ids
from flamingo_ft.adapters.trained_on import never_trained
from flamingo_ft.backbones.decoder_layers import context_length
from flamingo_ft.backbones.precision import inference_dtype
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.data.box_writer import image_size
from flamingo_ft.data.boxes import placed_boxes, view_text
from flamingo_ft.data.collate import pad_ids
from flamingo_ft.data.encode import encode_answer, encode_prompt
from flamingo_ft.data.sample import Box, Video
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.boxes import parse_boxes
from flamingo_ft.model.geometry import Corners, ImageGeometry
from flamingo_ft.model.images import read_image

from .decoding import Decoding
from .look import Look, look_at
from .media_inputs import FILES, MediaInputs
from .prompts import Prompt, make_prompt
from .ranking import AnswerScore, check_labels, score_answers, score_pairs
from .streaming import StopAtText, TokenReceiver, VisibleText, cut_at_stop, stream_text

BATCH_SIZE = 8
IMAGE_CACHE_MIB = 256
FORMATS = ("none", "int8", "nf4", "fp4")

_log = logging.getLogger(__name__)


class Predictor:
    """A model and its processor, ready to answer.

    batch_size: prompts answered together. image_cache_mib: memory for the tower's tokens of recent images;
    leave it at 0 if the tower may change. options: defaults of the methods, see `Decoding`.
    """

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        *,
        batch_size: int = BATCH_SIZE,
        image_cache_mib: int = 0,
        **options: Any,
    ):
        self.model, self.processor = model, processor
        self.batch_size, self.decoding = batch_size, Decoding(**options)
        self.media = MediaInputs(model, processor, image_cache_mib << 20)
        self._warned: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        start: str | Path | None = None,
        quantization: str | Quantization | None = None,
        dtype: str = "auto",
        image_cache_mib: int = IMAGE_CACHE_MIB,
        **options: Any,
    ) -> Predictor:
        """Load an adapter or a merged model, from a folder or by ``org/name[@revision]`` on the Hub.

        start: where the bridge that an adapter builds on is now, if not at its recorded path.
        quantization: of the frozen backbones: ``"int8"``, ``"nf4"``, ``"fp4"``, ``"none"``, or a
        `Quantization`; by default as in training, or as the merged model is stored. dtype: of the other
        weights, and of the computation: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``, see
        `inference_dtype`. options: as in the constructor.

        Raises UserError for an unknown option, and as `load_adapter` does.
        """
        if isinstance(quantization, str) and quantization not in FORMATS:
            known = ", ".join(FORMATS)
            raise UserError(f"quantization: must be one of {known}, got {quantization}")
        if isinstance(quantization, str) and quantization != "none":
            quantization = Quantization(quantization)
        loaded = load_trained(
            name_or_folder, start=start, quantization=quantization, dtype=inference_dtype(dtype)
        )
        return cls(*loaded, image_cache_mib=image_cache_mib, **options)

    def __call__(self, images: Any, prompt: str | None = None, **options: Any) -> str:
        """Answer a prompt about one image or a list: paths, URLs, bytes, Pillow images or arrays.

        ``<image>`` in the prompt marks where each image belongs; without markers, the images come first.
        Without a prompt, the model continues the image as it was trained on captions. options: see
        `Decoding`. Raises UserError if images and markers do not match, for an unreadable image, and for a
        prompt that is too long.
        """
        return self.answer([make_prompt(images, prompt)], **options)[0]

    def batch(
        self, requests: Iterable[tuple[Any, str | None]], *, batch_size: int | None = None, **options: Any
    ) -> list[str]:
        """Answer many ``(images, prompt)`` pairs, in their order. Raises UserError as `__call__` does."""
        prompts = [make_prompt(images, prompt) for images, prompt in requests]
        return self.answer(prompts, batch_size=batch_size, **options)

    def stream(self, images: Any, prompt: str | None = None, **options: Any) -> Generator[str]:
        """Yield the answer to a prompt piece by piece; together they are what `__call__` returns.

        Closing the generator ends the answer. Raises UserError as `__call__` does, and for beam search, whose
        answer is not known before its end.
        """
        return self.stream_answer(make_prompt(images, prompt), **options)

    def look(self, images: Any, prompt: str | None = None, **options: Any) -> Look:
        """Answer a prompt as `__call__` does, and show where in the images each token of the answer looks.

        Raises UserError as `__call__` does, and for a prompt without images.
        """
        return self.look_at(make_prompt(images, prompt), **options)

    def look_at(self, prompt: Prompt, answer_ids: Sequence[int] | None = None, **options: Any) -> Look:
        """Answer a dialogue and show where its last answer looks; see `look`.

        answer_ids: the tokens of an answer that was given already, which is then not generated again.
        Raises UserError as `look` does.
        """
        decoding, encoded = self.decoding.updated(**options), self.encode([prompt])
        media = self.media.pixels_of([prompt])
        with self.evaluation_mode(), seeded(decoding):
            if answer_ids is None:
                (answer_ids,) = self._generate(encoded, media, decoding)
            answer_ids = list(answer_ids)
            (answer,) = self._texts([answer_ids], decoding)
            inputs = {"input_ids": torch.tensor(encoded), **media}
            on_device = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
            return look_at(self.model, self.processor, on_device, answer_ids, answer)

    def boxes_in(self, answer: str, image: Any) -> list[Corners]:
        """Return the boxes in an answer as (x1, y1, x2, y2) in pixels of the image that they are on.

        Any four whole numbers in brackets that could be a box count (`placed_boxes`), even if the model was
        never trained on boxes.

        image: in a form that `__call__` takes; upright, as it is shown. Raises UserError for a video and for
        an image that cannot be read.
        """
        if not any(parse_boxes(answer)):
            return []
        return [placed.box for placed in placed_boxes(answer, [self.geometry_of(image)])]

    def box_text(self, box: Corners, image: Any) -> str:
        """Return a box, (x1, y1, x2, y2) in pixels of ``image``, as the text that stands for it in a prompt.

        Raises UserError as `boxes_in` does, and for a box that is outside of what the model sees.
        """
        return view_text(Box(box), self.geometry_of(image))

    def geometry_of(self, image: Any) -> ImageGeometry:
        """Return where points of an image are in what the model sees of it.

        Raises UserError for a video and for an image that cannot be read.
        """
        if isinstance(image, Video):
            raise UserError("boxes: not supported on videos; use an image")
        medium: Any = image
        size = image_size(medium) if isinstance(image, FILES) else read_image(image).size
        return self.processor.image_processor.geometry(ImageGeometry.of(*size))

    def answer(
        self,
        prompts: Sequence[Prompt],
        *,
        batch_size: int | None = None,
        on_batch: Callable[[int], None] = lambda count: None,
        **options: Any,
    ) -> list[str]:
        """Answer dialogues, in their order. on_batch: called with the size of each finished batch.

        Raises UserError as `__call__` does.
        """
        answers = [""] * len(prompts)
        for finished in self.batches(prompts, batch_size=batch_size, **options):
            for index, text in finished.items():
                answers[index] = text
            on_batch(len(finished))
        return answers

    def batches(
        self, prompts: Sequence[Prompt], *, batch_size: int | None = None, **options: Any
    ) -> Iterator[dict[int, str]]:
        """Yield the answers of one batch after another, by the index of the prompt.

        Prompts of similar length share a batch, which saves padding; one that leaves less room for its answer
        than ``max_new_tokens`` is answered alone. The model is in evaluation mode meanwhile. Raises UserError
        as `__call__` does.
        """
        decoding, encoded = self.decoding.updated(**options), self.encode(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].images), len(encoded[i])))
        with self.evaluation_mode(), seeded(decoding):
            for indices in self._grouped(order, encoded, batch_size or self.batch_size, decoding):
                media = self.media.of([prompts[index] for index in indices])
                answers = self._generate([encoded[index] for index in indices], media, decoding)
                yield dict(zip(indices, self._texts(answers, decoding), strict=True))

    def rank(
        self,
        prompts: Sequence[Prompt],
        labels: Sequence[str],
        *,
        with_end: bool = True,
        per_token: bool = False,
        batch_size: int | None = None,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> Tensor:
        """Return the log-likelihood (prompts, labels) of each label as the answer, in nats, on the CPU.

        with_end: include the token that ends the answer; without it, a label is never less likely than one
        that continues it. per_token: divide by the label's number of tokens. on_batch: called with the size
        of each finished batch. Raises UserError for labels that are missing, blank or repeated, and as
        `answer` does.
        """
        check_labels(labels)
        encoded, scores = self.encode(prompts), torch.empty(len(prompts), len(labels))
        ends = end_token_ids(self.model, self.processor)
        order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
        with self.evaluation_mode():
            for _, alike in groupby(order, key=lambda index: len(encoded[index])):  # they need no padding
                for indices in _batches(list(alike), batch_size or self.batch_size):
                    chosen = [prompts[index] for index in indices]
                    answers = [self._answer_tokens(chosen[0], label, ends, with_end) for label in labels]
                    ids, media = [encoded[index] for index in indices], self.media.of(chosen)
                    scores[indices] = score_answers(self.model, ids, media, answers)
                    if per_token:
                        scores[indices] /= torch.tensor([len(answer) for answer in answers])
                    on_batch(len(indices))
        return scores

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        *,
        batch_size: int | None = None,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> list[AnswerScore]:
        """Return how likely each answer is to be given to the prompt at its index, in their order.

        To score many labels for each prompt, use `rank`. on_batch: called with the size of each finished
        batch. Raises UserError as `answer` does, and for an answer that the context has no room for.
        """
        ends = end_token_ids(self.model, self.processor)
        pairs = [self._encode_pair(*pair, ends) for pair in zip(prompts, answers, strict=True)]
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].images), sum(map(len, pairs[i]))))
        scores: dict[int, AnswerScore] = {}
        with self.evaluation_mode():
            for indices in _batches(order, batch_size or self.batch_size):
                media = self.media.of([prompts[index] for index in indices])
                ids, tokens = zip(*(pairs[index] for index in indices), strict=True)
                batch = score_pairs(self.model, ids, media, tokens, self.processor.tokenizer.pad_token_id)
                scores.update(zip(indices, batch, strict=True))
                on_batch(len(indices))
        return [scores[index] for index in range(len(prompts))]

    def stream_answer(self, prompt: Prompt, **options: Any) -> Generator[str]:
        """Yield the answer to a dialogue piece by piece. Raises UserError as `stream` does."""
        decoding = self.decoding.updated(**options)
        refuse_beams(decoding)
        (ids,) = self.encode([prompt])
        inputs = self.media.of([prompt])

        def run(on_text: Callable[[str], None], is_cancelled: Callable[[], bool]) -> None:
            receiver = self.receiver(decoding, on_text, is_cancelled)
            with self.evaluation_mode(), seeded(decoding):
                self.generate([ids], inputs, decoding, receiver)
            receiver.finish()

        return stream_text(run)

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the token ids of each prompt. Raise UserError for a prompt that leaves no room to answer."""
        encoded = [self._encode(prompt) for prompt in prompts]
        self._warn_of_new_forms(prompts)
        return encoded

    def generate(
        self,
        encoded: Sequence[list[int]],
        media: dict[str, Tensor],
        decoding: Decoding,
        *criteria: StoppingCriteria,
        **options: Any,
    ) -> Any:
        """Run the model's ``generate`` on token ids, left-padded, no longer than the context has room for.

        criteria, options: passed to it. Returns what it returns.
        """
        pad_token_id = self.processor.tokenizer.pad_token_id
        inputs: dict[str, Any] = pad_ids(encoded, pad_token_id, "left") | media
        room = context_length(self.model.config) - max(map(len, encoded))
        return self.model.generate(
            **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
            max_new_tokens=min(decoding.max_new_tokens, room),
            eos_token_id=end_token_ids(self.model, self.processor) or None,
            pad_token_id=pad_token_id,
            stopping_criteria=StoppingCriteriaList(criteria),
            **decoding.generate_options(),
            **options,
        )

    def receiver(
        self, decoding: Decoding, on_text: Callable[[str], None], is_cancelled: Callable[[], bool]
    ) -> TokenReceiver:
        """Return the stopping criterion that passes an answer on while it is generated."""
        end_tokens = end_token_ids(self.model, self.processor)
        text = VisibleText(decoding.stop_strings)
        return TokenReceiver(self.processor.tokenizer, end_tokens, text, on_text, is_cancelled)

    @contextmanager
    def evaluation_mode(self) -> Generator[None]:
        """Put the model into evaluation mode inside the context, and back afterwards."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def _warn_of_new_forms(self, prompts: Sequence[Prompt]) -> None:
        """Log, once each, how prompts are unlike all training samples; not of questions with references,
        whose scores say more."""
        for prompt in prompts:
            if type(prompt) is Prompt:
                lines = never_trained(self.model.config.trained_on, prompt.messages, len(prompt.images))
                line = "; ".join(lines)
                if line and line not in self._warned:
                    self._warned.add(line)
                    _log.warning("%s: %s", prompt.where, line)

    def _encode(self, prompt: Prompt) -> list[int]:
        ids, limit = encode_prompt(self.processor, prompt.messages), context_length(self.model.config)
        if len(ids) >= limit:
            problem = f"got {len(ids)} text tokens to answer, but the language model's context is {limit}"
            raise UserError(f"{prompt.where}: {problem}; shorten the prompt")
        return ids

    def _encode_pair(
        self, prompt: Prompt, answer: str, end_tokens: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Return the token ids of a prompt and of its answer, the end included."""
        ids, limit = self._encode(prompt), context_length(self.model.config)
        tokens = self._answer_tokens(prompt, answer, end_tokens)
        if len(ids) + len(tokens) > limit:
            problem = f"got {len(ids)} text tokens and {len(tokens)} of the answer, but the language model's"
            raise UserError(f"{prompt.where}: {problem} context is {limit}; shorten the prompt")
        return ids, tokens

    def _grouped(
        self, order: Sequence[int], encoded: Sequence[list[int]], batch_size: int, decoding: Decoding
    ) -> Iterator[list[int]]:
        """Yield the indices of each batch: a long prompt must not shorten the answers of others."""
        longest = context_length(self.model.config) - decoding.max_new_tokens
        yield from _batches([index for index in order if len(encoded[index]) <= longest], batch_size)
        yield from ([index] for index in order if len(encoded[index]) > longest)

    def _answer_tokens(
        self, prompt: Prompt, answer: str, end_tokens: Sequence[int], with_end: bool = True
    ) -> list[int]:
        """Return the tokens of an answer to ``prompt``, up to the first that ends it."""
        tokens = encode_answer(self.processor, prompt.messages, answer)
        end = next((place for place, token in enumerate(tokens) if token in end_tokens), len(tokens))
        return tokens[: end + with_end]

    @torch.no_grad()
    def _generate(
        self, encoded: Sequence[list[int]], media: dict[str, Tensor], decoding: Decoding
    ) -> list[list[int]]:
        """Return the tokens of the answers to one batch, up to their end tokens."""
        tokenizer, length = self.processor.tokenizer, max(map(len, encoded))
        criteria = [StopAtText(tokenizer, length, decoding.stop_strings)] if decoding.stop_strings else []
        output = self.generate(encoded, media, decoding, *criteria)
        end_tokens = end_token_ids(self.model, self.processor)
        rows = output[:, length:].tolist()
        return [list(takewhile(lambda token: token not in end_tokens, row)) for row in rows]

    def _texts(self, answers: Sequence[list[int]], decoding: Decoding) -> list[str]:
        """Return the text of answers, cut before the first stop string."""
        texts = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [cut_at_stop(text, decoding.stop_strings).strip() for text in texts]


load = Predictor.from_pretrained  # `flamingo_ft.load`


def _batches(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])


@contextmanager
def seeded(decoding: Decoding) -> Generator[None]:
    """Sample with the decoding's seed, if it has one, and leave the state of the random generators alone."""
    if decoding.seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(decoding.seed)
        yield


def refuse_beams(decoding: Decoding) -> None:
    """Raise UserError for beam search, which cannot be streamed."""
    if decoding.num_beams > 1:
        raise UserError(
            f"num_beams: the answer of beam search cannot be streamed, got {decoding.num_beams}; "
            "use 1, or ask without streaming"
        )
