"""The processor: text and images to the model's inputs.

Shapes: B samples, M images per sample, C channels, H height, W width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from flamingo_ft.backbones.tower import image_transform
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import plural
from flamingo_ft.hub.names import check_path_exists

from .added_tokens import EOC_TOKEN, MEDIA_TOKEN
from .chat_template import answer_template
from .geometry import ImageGeometry, tower_geometry
from .images import read_image, to_rgb
from .special_text import protect
from .tile_tags import tile_tag_ids
from .tiles import UNTILED, Grid, Tiling
from .tokenize_texts import tokenize
from .views import Views, stack_media

# Flamingo's own format (arXiv:2204.14198, figure 7), for language models without a chat template. The space
# before an answer is the assistant's: with most tokenizers it is part of the answer's first token.
CHUNK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] }}" + EOC_TOKEN + "{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)

IMAGE_BLOCKS = ("image", "image_url")


class FlamingoImageProcessor(BaseImageProcessor):
    """The tower's own image transform: RGB, resize, crop and normalize as its OpenCLIP configuration says."""

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        open_clip_preprocess: Mapping[str, Any] | None = None,
        video_frames: int = 8,
        tiles: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        """video_frames: frames read of a video. tiles: fields of `Tiling`, None for no tiles.

        Both are stored here so that they are the same after training.
        """
        super().__init__(**kwargs)
        self.open_clip_preprocess = dict(open_clip_preprocess or {})
        self.video_frames = video_frames
        self.tiles = None if tiles is None else dict(tiles)

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Turn an image, or a list of them (`read_image` lists the forms), into pixel_values (N, C, H, W).

        With tiles, they are (N, F, C, H, W), with frame_counts (N,) and tile_grids (N, 2) where they differ.
        Raises UserError for an image that cannot be read.
        """
        images = images if isinstance(images, (list, tuple)) else [images]
        batch = stack_media([[self.views(read_image(image)) for image in images]])
        return BatchFeature({name: values[0] for name, values in batch.items()})

    def views(self, image: Any) -> Views:
        """Turn an image, in a form that `transform` takes, into what the tower gets of it."""
        picture = to_rgb(image)
        if self.tiling is None:
            return Views(self._transform(picture)[None], image_size=picture.size)
        grid = self.grid_of(picture)
        parts = self.tiling.views(picture, grid, self.input_size, self._resampling)
        return Views(torch.stack([self._transform(part) for part in parts]), grid, picture.size)

    def whole_view(self, image: Any) -> Tensor:
        """Turn an image into pixels (C, H, W) of one view; with tiles, the one that shows all of it."""
        if self.tiling is None:
            return self.transform(image)
        (view,) = self.tiling.views(to_rgb(image), UNTILED, self.input_size, self._resampling)
        return self._transform(view)

    def grid_of(self, picture: Image.Image) -> Grid:
        """Return the grid of tiles that a picture is divided into."""
        return UNTILED if self.tiling is None else self.tiling.grid(*picture.size, self.input_size)

    def view_count(self, picture: Image.Image) -> int:
        """Return how many views of a picture the tower gets."""
        return 1 if self.tiling is None else len(self.tiling.view_names(self.grid_of(picture)))

    def geometry(self, picture: ImageGeometry) -> ImageGeometry:
        """Return where points of a picture are in what the model sees; tiles together show all of it."""
        if self.tiling is not None:
            return picture
        return tower_geometry(picture, self.open_clip_preprocess, self.input_size)

    @property
    def tiling(self) -> Tiling | None:
        """How images are divided into tiles; None if they are not."""
        return None if self.tiles is None else Tiling(**self.tiles)

    @property
    def transform_record(self) -> dict[str, Any]:
        """All that the pixels of an image depend on, for keys of caches."""
        return self.open_clip_preprocess | ({} if self.tiles is None else {"tiles": self.tiles})

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width in pixels of the tower's input."""
        size = self.open_clip_preprocess["size"]
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def _resampling(self) -> Image.Resampling:
        """The filter with which OpenCLIP's transform resizes."""
        name = self.open_clip_preprocess.get("interpolation")
        return Image.Resampling.BILINEAR if name == "bilinear" else Image.Resampling.BICUBIC

    def transform(self, image: Any) -> Tensor:
        """Turn a Pillow image, numpy array or torch tensor (`images.to_rgb`) into pixels (C, H, W)."""
        return self._transform(to_rgb(image))

    @cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        return image_transform(self.open_clip_preprocess)

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved; the transform is rebuilt from its configuration."""
        return {key: value for key, value in super().to_dict().items() if key != "_transform"}


class FlamingoProcessor(ProcessorMixin):
    """Tokenizer and image processor of a Flamingo; every image is one ``<image>`` in the text."""

    def __init__(
        self,
        image_processor: FlamingoImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        self.image_token = MEDIA_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(MEDIA_TOKEN)
        self.input_only_ids = frozenset([self.image_token_id, *tile_tag_ids(tokenizer)])
        chat_template = chat_template or _template_of(tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def for_backbones(
        cls, preprocess: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> FlamingoProcessor:
        """Build the processor from a tower's transform and a tokenizer that already has the media tokens."""
        return cls(FlamingoImageProcessor(preprocess), tokenizer)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> FlamingoProcessor:
        """Load as any transformers processor. Raises UserError for a path that leads nowhere."""
        check_path_exists(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Return the tokenized text and, if there are images, zero-padded pixel_values (B, M, C, H, W).

        With tiles, the result has an axis F of views after M, frame_counts and tile_grids (`stack_media`).

        images: one, a list (assigned in the order of the ``<image>`` markers), or a list per text; each a PIL
        image, numpy array, torch tensor, path, URL, data URI, base64 text or a file's bytes. Keyword
        arguments go to the tokenizer. It adds no special tokens to texts that begin with one, as rendered
        chat templates do in training. Special tokens that a user typed (`special_text`), marked by
        `apply_chat_template`, stay text. Raises UserError if images and markers do not match, if a marker is
        lost to truncation, and for an image that cannot be read.
        """
        if text is None:
            raise UserError(
                f"processor: got images without text; pass a text with one {MEDIA_TOKEN} where each belongs"
            )
        texts = [text] if isinstance(text, str) else list(text)
        nested = assign_images(images, [t.count(self.image_token) for t in texts])
        return_tensors = kwargs.pop("return_tensors", None)
        arguments = {
            "add_special_tokens": not _are_complete(self.tokenizer, texts),
            **_text_arguments(kwargs),
        }
        data = tokenize(self.tokenizer, texts, **arguments)
        self._check_media_tokens(data["input_ids"], [len(row) for row in nested])
        if any(nested):
            data |= self.read_media(nested)
        return BatchFeature(data, tensor_type=return_tensors)

    def _check_media_tokens(self, input_ids: Any, expected: Sequence[int]) -> None:
        """Raise UserError for text that lost a marker.

        The images after it would be assigned to the wrong places.
        """
        for row, (ids, count) in enumerate(zip(input_ids, expected, strict=True)):
            remaining = list(ids).count(self.image_token_id)
            if remaining != count:
                raise UserError(
                    f"text {row} has {count} {MEDIA_TOKEN} markers but {remaining} after tokenization; "
                    "truncate less (max_length), or pass fewer images"
                )

    def read_media(self, nested: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """Read the images of each sample; return `stack_media` of them.

        Raises UserError for an image that cannot be read.
        """
        views = self.image_processor.views
        return stack_media([[views(read_image(image)) for image in row] for row in nested])

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Render a conversation as transformers' processors do; content blocks of images become ``<image>``.

        With ``tokenize=True``, the images in the blocks are processed too. A special token typed in a text
        block stays text: in rendered text a placeholder marks it for the processor (``special_text.restore``
        shows it). The prompt for an answer (``add_generation_prompt``) is the text that preceded answers in
        training. Raises UserError for a content block that is neither text nor an image.
        """
        single = isinstance(conversation[0], Mapping)
        conversations = [conversation] if single else conversation
        images = [_images_in(messages) for messages in conversations]
        if kwargs.get("tokenize"):  # the template has written all special tokens, the text's first one too
            image_arguments = {"images": images[0] if single else images} if any(images) else {}
            kwargs["processor_kwargs"] = {
                "add_special_tokens": False,
                **(kwargs.get("processor_kwargs") or {}),
                **image_arguments,
            }
        if not args and kwargs.get("chat_template") is None:
            kwargs["chat_template"] = self.answer_template
        texts = [[flatten(message, self.tokenizer) for message in messages] for messages in conversations]
        return super().apply_chat_template(texts[0] if single else texts, *args, **kwargs)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """Decode as the tokenizer does; without special tokens, surrounding white space is stripped too."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        return _stripped(text) if skip_special_tokens else text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Decode several sequences; see `decode`."""
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)
        # pyrefly: ignore[bad-return]
        return _stripped(texts) if skip_special_tokens else texts

    @property
    def answer_template(self) -> str:
        """The chat template, with a generation prompt that matches its answers (`chat_template`)."""
        # pyrefly: ignore[bad-argument-type]
        return answer_template(self.tokenizer, self.chat_template).text


def flatten(message: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the message with its content as one string, ``<image>`` for each image block.

    Special tokens spelled inside text blocks become placeholders (`special_text.protect`). A plain string
    stays as it is, its ``<image>`` markers standing for images. Raises UserError for blocks of other types.
    """
    content = message.get("content") or ""
    return {**message, "content": content if isinstance(content, str) else flat_text(content, tokenizer)}


def flat_text(content: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return content blocks as one string; see `flatten`."""
    for block in content:
        if block["type"] not in ("text", *IMAGE_BLOCKS):
            raise UserError(f"content block: got type {block['type']!r}; use text or image")
    runs = itertools.groupby(content, is_image)  # text that blocks divide may spell a special token together
    return "".join(
        MEDIA_TOKEN * len(list(blocks))
        if images
        else protect(tokenizer, "".join(block["text"] for block in blocks))
        for images, blocks in runs
    )


def is_image(block: Mapping[str, Any]) -> bool:
    """Return whether a content block is an image."""
    return block["type"] in IMAGE_BLOCKS


def assign_images(images: Any, markers: Sequence[int]) -> list[list[Any]]:
    """Return the images of each text, passed as nested lists or in the order of the markers.

    Raises UserError if the counts differ.
    """
    images = [] if images is None else images
    images = images if isinstance(images, (list, tuple)) else [images]
    remedy = f"put one {MEDIA_TOKEN} where each image belongs"
    if not any(isinstance(row, (list, tuple)) for row in images):
        return _assign_in_order(images, markers, remedy)
    if len(images) != len(markers):
        raise UserError(f"got {len(images)} lists of images for {len(markers)} texts; pass one each")
    for row, (own, count) in enumerate(zip(images, markers, strict=True)):
        if len(own or ()) != count:  # TRL's GRPO has None for a text without images
            found = plural(len(own or ()), "image")
            raise UserError(f"text {row} has {count} {MEDIA_TOKEN} markers but {found}; {remedy}")
    return [list(row or ()) for row in images]


def _assign_in_order(images: Sequence[Any], markers: Sequence[int], remedy: str) -> list[list[Any]]:
    """Assign one list of images to the texts in order, as many to each as it has markers."""
    if len(images) != sum(markers):
        where = "text 0 has" if len(markers) == 1 else f"{len(markers)} texts have"
        found = plural(len(images), "image")
        raise UserError(f"{where} {sum(markers)} {MEDIA_TOKEN} markers but {found}; {remedy}")
    remaining = iter(images)
    return [[next(remaining) for _ in range(count)] for count in markers]


def _images_in(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the images in the content blocks, in order; blocks without data are markers only."""
    contents = [message.get("content") or [] for message in messages]
    blocks = [block for content in contents if not isinstance(content, str) for block in content]
    block_images = [_image_of(block) for block in blocks if is_image(block)]
    return [image for image in block_images if image is not None]


def _image_of(block: Mapping[str, Any]) -> Any:
    if block["type"] == "image_url":
        link = block["image_url"]
        return link if isinstance(link, str) else link["url"]
    return next(
        (block[key] for key in ("image", "url", "path", "base64") if block.get(key) is not None), None
    )


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template, or Flamingo's own if it has none."""
    return chunk_template(tokenizer) if tokenizer.chat_template is None else tokenizer.get_chat_template()


def chunk_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return Flamingo's own template, with a BOS token first if the tokenizer puts one before a text."""
    return ("{{ bos_token }}" if begins_with_bos(tokenizer) else "") + CHUNK_TEMPLATE


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer puts its BOS token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def _stripped(text: str | list[str]) -> str | list[str]:
    return text.strip() if isinstance(text, str) else [each.strip() for each in text]


def _are_complete(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> bool:
    """Return whether every text begins with a special token of the language model's own.

    None needs to be added then.
    """
    own = tuple(token for token in tokenizer.all_special_tokens if token not in (MEDIA_TOKEN, EOC_TOKEN))
    return bool(own) and all(text.startswith(own) for text in texts)


def _text_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer's arguments, which transformers allows flat or grouped."""
    grouped = ("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs")
    flat = {key: value for key, value in kwargs.items() if key not in grouped}
    return {**flat, **kwargs.get("common_kwargs", {}), **kwargs.get("text_kwargs", {})}
