"""Labels against masks that this package did not compute."""

import json
from itertools import accumulate
from pathlib import Path

import pytest

from flamingo_ft.data.encode import IGNORED, encode
from flamingo_ft.data.sample import DOCUMENT
from flamingo_ft.data.schemas.build_sample import text_to_blocks
from flamingo_ft.model.added_tokens import add_media_tokens
from flamingo_ft.model.processor import FlamingoProcessor
from tests.golden.label_mask_cases import CAPTIONS, DOCUMENTS, word_tokenizer

from .dialogues import IMAGE, VICUNA, blocks, nano_processor
from .llama_tokenizer import llama_tokenizer

FOLDER = Path(__file__).parents[1] / "golden" / "label_masks"
OPEN_FLAMINGO = json.loads((FOLDER / "open_flamingo.json").read_text())
LLAVA = json.loads((FOLDER / "llava_v1.json").read_text(encoding="utf-8"))


def compare_with_open_flamingo(parts, recorded):
    processor = FlamingoProcessor(nano_processor().image_processor, word_tokenizer())
    content = blocks(tuple(IMAGE if part is None else part for part in parts))
    encoded = encode(processor, [{"role": DOCUMENT, "content": content}])
    assert encoded.input_ids == recorded["input_ids"]
    assert encoded.labels == recorded["labels"]


@pytest.mark.parametrize("number", range(len(CAPTIONS)))
def test_captions_have_the_labels_of_open_flamingos_training_loop(number):
    compare_with_open_flamingo([None, CAPTIONS[number]], OPEN_FLAMINGO["captions"][number])


@pytest.mark.parametrize("number", range(len(DOCUMENTS)))
def test_documents_have_the_labels_of_open_flamingos_training_loop(number):
    compare_with_open_flamingo(DOCUMENTS[number], OPEN_FLAMINGO["documents"][number])


@pytest.mark.parametrize("case", LLAVA)
@pytest.mark.parametrize("legacy", [False, True])
def test_dialogues_in_llavas_form_have_the_labels_of_its_rule(case, legacy):
    """Loss on each answer, from the space before it to the end token after it."""
    tokenizer = llama_tokenizer(legacy)
    add_media_tokens(tokenizer)
    processor = FlamingoProcessor(nano_processor().image_processor, tokenizer, chat_template=VICUNA)
    roles = ["system", *["user", "assistant"] * (len(case["turns"]) // 2)]
    texts = [case["system"], *case["turns"]]
    encoded = encode(
        processor,
        [{"role": role, "content": text_to_blocks(text)} for role, text in zip(roles, texts, strict=True)],
    )
    pieces = [piece for piece, _ in case["written"]]
    whole = tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
    ends = list(accumulate(map(len, pieces)))
    pieces_of_tokens = [next(i for i, end in enumerate(ends) if b <= end) for _, b in whole["offset_mapping"]]
    has_loss = [case["written"][piece][1] for piece in pieces_of_tokens]
    assert encoded.input_ids == whole["input_ids"]
    expected = [token if each else IGNORED for token, each in zip(whole["input_ids"], has_loss, strict=True)]
    assert encoded.labels == expected
