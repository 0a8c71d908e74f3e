"""A loaded model that answers questions about images, as often as it is asked.

    predictor = Predictor.from_pretrained("runs/quickstart")
    predictor("photo.png", "What is this?")
    predictor.batch([("a.png", "What is this?"), (["a.png", "b.png"], "Is <image> larger than <image>?")])
    predictor.look("photo.png", "What is this?").figure()

Commands, notebooks, evaluation and training all ask through it. Answers are greedy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.adapters import load_trained
from flamingo_ft.adapters.answering import MAX_NEW_TOKENS, end_token_ids
from flamingo_ft.backbones.decoder_layers import context_length
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.data.collate import pad_ids, stack_media
from flamingo_ft.data.encode import encode_prompt
from flamingo_ft.data.media import load_pixels
from flamingo_ft.data.sample import Video
from flamingo_ft.data.schemas.build_sample import text_to_blocks
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import plural
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.added_tokens import MEDIA_TOKEN
from flamingo_ft.model.images import UnreadableImage, to_rgb

from .look import Look, look_at

BATCH_SIZE = 8
FORMATS = ("none", "int8", "nf4", "fp4")
FILES = (str, bytes, os.PathLike, Video)  # images by path, URL or content; others are already decoded


@dataclass(frozen=True)
class Prompt:
    """A dialogue up to where the assistant answers.

    messages: ``role`` and ``content``, typed blocks with one image block per image. images: paths, URLs,
    contents of image files, videos, or decoded images. where: origin of the prompt, named in errors.
    """

    messages: list[dict[str, Any]]
    images: Sequence[Any]
    where: str = "prompt"


class Predictor:
    """A model and its processor, ready to answer.

    batch_size, max_new_tokens: defaults of the methods; the longest answer in tokens includes its end token.
    """

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        *,
        batch_size: int = BATCH_SIZE,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ):
        self.model, self.processor = model, processor
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        quantization: str | Quantization | None = None,
        **options: Any,
    ) -> Predictor:
        """Load an adapter or a merged model, from a folder or by ``org/name[@revision]`` on the Hub.

        quantization: of the frozen backbones: ``"int8"``, ``"nf4"``, ``"fp4"``, ``"none"``, or a
        `Quantization`; by default as in training, or as the merged model is stored. options: as in the
        constructor.
        """
        if isinstance(quantization, str) and quantization not in FORMATS:
            known = ", ".join(FORMATS)
            raise UserError(f"quantization: must be one of {known}, got {quantization}")
        if isinstance(quantization, str) and quantization != "none":
            quantization = Quantization(quantization)
        return cls(*load_trained(name_or_folder, quantization=quantization), **options)

    def __call__(self, images: Any, prompt: str, *, max_new_tokens: int | None = None) -> str:
        """Answer a prompt about one image or a list: paths, URLs, bytes, Pillow images or arrays.

        ``<image>`` in the prompt marks where each image belongs; without markers, the images come first.
        Raises UserError if images and markers do not match, for an unreadable image, and for a prompt that is
        too long.
        """
        return self.answer([make_prompt(images, prompt)], max_new_tokens=max_new_tokens)[0]

    def batch(
        self,
        requests: Iterable[tuple[Any, str]],
        *,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """Answer many ``(images, prompt)`` pairs, in their order."""
        prompts = [make_prompt(images, prompt) for images, prompt in requests]
        return self.answer(prompts, batch_size=batch_size, max_new_tokens=max_new_tokens)

    def look(self, images: Any, prompt: str, *, max_new_tokens: int | None = None) -> Look:
        """Answer a prompt as `__call__` does, and show where in the images each token of the answer looks.

        Raises UserError as `__call__` does, and for a prompt without images.
        """
        question = make_prompt(images, prompt)
        with self.evaluation_mode(), torch.no_grad():
            inputs = self._inputs([question])
            (answer_ids,) = self._generate_ids(inputs, max_new_tokens or self.max_new_tokens)
            (answer,) = self._texts([answer_ids])
            return look_at(self.model, self.processor, inputs, answer_ids, answer)

    def answer(
        self,
        prompts: Sequence[Prompt],
        *,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        """Answer dialogues, in their order. on_batch: called with the size of each finished batch.

        Prompts of similar length share a batch, which saves padding. The model is in evaluation mode
        meanwhile.
        """
        batch_size, max_new_tokens = batch_size or self.batch_size, max_new_tokens or self.max_new_tokens
        answers, sizes = [""] * len(prompts), [(len(p.images), len(str(p.messages))) for p in prompts]
        order = sorted(range(len(prompts)), key=sizes.__getitem__)
        with self.evaluation_mode():
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                generated = self._generate([prompts[index] for index in indices], max_new_tokens)
                for index, text in zip(indices, generated, strict=True):
                    answers[index] = text
                on_batch(len(indices))
        return answers

    @contextmanager
    def evaluation_mode(self) -> Generator[None]:
        """Put the model into evaluation mode inside the context, and back afterwards."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the token ids of each prompt. Raise UserError for a prompt that leaves no room to answer."""
        limit, encoded = context_length(self.model.config), []
        for prompt in prompts:
            ids = encode_prompt(self.processor, prompt.messages)
            if len(ids) >= limit:
                problem = f"got {len(ids)} text tokens to answer, but the language model's context is {limit}"
                raise UserError(f"{prompt.where}: {problem}; shorten the prompt")
            encoded.append(ids)
        return encoded

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Generate answers to one batch greedily, no longer than the context has room for."""
        return self._texts(self._generate_ids(self._inputs(prompts), max_new_tokens))

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Return one batch of prompts, padded on the left, and their media as the model's inputs."""
        text = pad_ids(self.encode(prompts), self.processor.tokenizer.pad_token_id, "left")
        media = stack_media([[self._pixels(image, p.where) for image in p.images] for p in prompts])
        return {name: tensor.to(self.model.device) for name, tensor in (text | media).items()}

    def _generate_ids(self, inputs: dict[str, Any], max_new_tokens: int) -> list[list[int]]:
        """Return the tokens of the answers, up to their end tokens."""
        model, length = self.model, inputs["input_ids"].shape[1]
        end_tokens = end_token_ids(model, self.processor)
        output = model.generate(
            **inputs,
            max_new_tokens=min(max_new_tokens, context_length(model.config) - length),
            eos_token_id=end_tokens or None,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            do_sample=False,
        )
        rows = output[:, length:].tolist()
        return [list(takewhile(lambda token: token not in end_tokens, row)) for row in rows]

    def _texts(self, answers: Sequence[list[int]]) -> list[str]:
        texts = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _pixels(self, image: Any, where: str) -> Tensor:
        """Read an image or video as pixels (F frames, C, H, W)."""
        if isinstance(image, FILES):
            medium: Any = image
            return load_pixels(self.processor, medium, where)
        try:
            return self.processor.image_processor.transform(to_rgb(image)).unsqueeze(0)
        except UnreadableImage as error:
            raise UserError(f"{where}: not a readable image ({error}); replace it") from None


def make_prompt(images: Any, prompt: str) -> Prompt:
    """Make a prompt of one user message from a text and its images; see `Predictor.__call__`."""
    if images is None:
        images = []
    elif not isinstance(images, (list, tuple)):
        images = [images]
    return Prompt([{"role": "user", "content": place_images(prompt, len(images))}], images)


def place_images(prompt: str, images: int) -> list[dict[str, str]]:
    """Return the prompt as typed blocks; without ``<image>`` markers, the images come first."""
    markers = prompt.count(MEDIA_TOKEN)
    if markers == 0:
        return [*[{"type": "image"}] * images, {"type": "text", "text": prompt}]
    if markers != images:
        counts = f"{plural(markers, f'{MEDIA_TOKEN} marker')} and {plural(images, 'image')}"
        raise UserError(f"prompt: got {counts}; give one image for each marker")
    return text_to_blocks(prompt)
