"""Record the labels that open-flamingo 2.0.1's own training loop gives to captions and interleaved documents.

    python -m tests.golden.record_label_masks        # from the root, in the environment of the README

Writes label_masks/open_flamingo.json. The peer's own preprocessing writes the texts, and its own
`train_one_epoch` passes them to a model that records its labels; images are blank.

Patched on the peer at run time: `wandb`, used only for logging, need not be installed; the folder of its data
module is added to the path, from which it imports another module; tokenizers get back their attribute
`additional_special_tokens`, from which the preprocessing reads the media token; `random.random` returns 1,
because documents of one image are dropped at random.
"""

from __future__ import annotations

import base64
import io
import json
import random
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_flamingo
import torch
from PIL import Image
from torch import Tensor, nn

from tests.golden.label_mask_cases import CAPTIONS, DOCUMENTS, EOC, MEDIA, word_tokenizer

FILE = Path(__file__).parent / "label_masks" / "open_flamingo.json"
IMAGES, TOKENS = 3, 48


class LabelRecorder(nn.Module):
    """Stands in for a Flamingo: returns a loss with a gradient, and records the labels of each batch."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.lang_encoder = nn.Module()
        self.lang_encoder.embedding = nn.Embedding(vocabulary, 1)
        self.lang_encoder.get_input_embeddings = lambda: self.lang_encoder.embedding
        self.module = types.SimpleNamespace(lang_encoder=self.lang_encoder)  # as DDP wraps it
        self.recorded: list[tuple[Tensor, Tensor]] = []

    def forward(
        self, vision_x: Tensor, lang_x: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor]:
        self.recorded.append((lang_x, labels))
        return (self.lang_encoder.embedding.weight.sum(),)


def document_of(parts: list[str | None]) -> str:
    """Return the document as in MMC4's shards: sentences, and the index of the sentence of each image."""
    sentences = [part for part in parts if part is not None] + [""] * (parts[-1] is None)
    noise = Image.effect_noise((160, 160), 90)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    image = {"image_base64": base64.b64encode(buffer.getvalue()).decode()}
    before = [sum(p is not None for p in parts[:i]) for i, part in enumerate(parts) if part is None]
    similar = [[float(sentence == index) for sentence in range(len(sentences))] for index in before]
    return json.dumps(
        {"text_list": sentences, "similarity_matrix": similar, "image_info": [image] * len(before)}
    )


def batches(tokenizer: Any) -> tuple[list, list]:
    """Return one batch of captions and one of documents, as the peer's loaders yield them."""
    from open_flamingo.train.data import preprocess_interleaved, preprocess_laion_text

    captions = preprocess_laion_text(CAPTIONS, tokenizer, max_tokens=TOKENS)
    blank = torch.zeros(3, 224, 224)
    documents = []
    with patch(
        "open_flamingo.train.data.preprocess_image", lambda images, _: torch.stack([blank] * len(images))
    ):
        for parts in DOCUMENTS:
            text = [document_of(parts)]
            documents.append(preprocess_interleaved(text, tokenizer, None, 0.0, 1, IMAGES, TOKENS))
    images = torch.stack([image for image, _ in documents])
    return [(torch.stack([blank] * len(CAPTIONS)), captions)], [(images, [text for _, text in documents])]


class Loader(list):
    num_batches = 1


def main() -> None:
    """Record captions and documents."""
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))
    sys.path.append(str(Path(open_flamingo.__file__).parent / "train"))
    from open_flamingo.train.train_utils import train_one_epoch

    tokenizer = word_tokenizer()
    type(tokenizer).additional_special_tokens = [EOC, MEDIA]
    type(tokenizer).additional_special_tokens_ids = tokenizer.convert_tokens_to_ids([EOC, MEDIA])
    captions, documents = batches(tokenizer)
    model = LabelRecorder(len(tokenizer))
    settings = {
        "num_epochs": 1,
        "precision": "fp32",
        "fsdp": False,
        "rank": 0,
        "gradient_accumulation_steps": 1,
    }
    settings |= {"loss_multiplier_laion": 1.0, "loss_multiplier_mmc4": 1.0, "freeze_lm_embeddings": False}
    settings |= {"report_to_wandb": False, "logging_steps": 100, "fsdp_use_orig_params": False}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    arguments = types.SimpleNamespace(**settings)
    with patch.object(random, "random", lambda: 1.0):
        train_one_epoch(
            arguments,
            model,
            0,
            Loader(captions),
            Loader(documents),
            tokenizer,
            optimizer,
            schedule,
            "cpu",
            None,
        )
    recorded = {}
    for name, (ids, labels) in zip(("captions", "documents"), model.recorded, strict=True):
        rows = zip(ids.long().tolist(), labels.long().tolist(), strict=True)
        recorded[name] = [_without_padding(row, learned, tokenizer.pad_token_id) for row, learned in rows]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(recorded) + "\n")


def _without_padding(ids: list[int], labels: list[int], pad: int) -> dict[str, list[int]]:
    length = ids.index(pad) if pad in ids else len(ids)
    return {"input_ids": ids[:length], "labels": labels[:length]}


if __name__ == "__main__":
    main()
