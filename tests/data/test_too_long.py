"""Samples with too many tokens: what each policy keeps; no image is kept without its text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_ft.data.encode import IGNORED, Dropped, Encoded, encode, encode_within
from flamingo_ft.data.sample import DOCUMENT, Sample
from flamingo_ft.errors import UserError

from .dialogues import IMAGE, TEMPLATES, assistant, blocks, nano_processor, system, user

TURNS = [
    system("Be brief."), user(IMAGE, "Which?"), assistant("Seven."), user(IMAGE, IMAGE, "And these?"),
    assistant("One and two."), user("Why?"), assistant("They are."),
]  # fmt: skip
PARTS = ("so", IMAGE, "one two three", IMAGE, "four five", IMAGE, IMAGE, "six")
CHUNKS = [{"role": DOCUMENT, "content": blocks(PARTS)}]


def sample(messages) -> Sample:
    images = sum(block == IMAGE for message in messages for block in message["content"])
    return Sample(list(messages), [f"{number}.png" for number in range(images)], "other", "a.json: row 5")


def length(messages) -> int:
    return len(encode(nano_processor(), messages).input_ids)


@pytest.mark.parametrize("policy", ["error", "drop_sample", "drop_turns", "truncate_text"])
def test_a_sample_that_fits_is_unchanged(policy):
    result = encode_within(nano_processor(), sample(TURNS), length(TURNS), policy)
    assert result == encode(nano_processor(), TURNS)


def test_the_error_of_a_too_long_sample_names_its_row():
    with pytest.raises(
        UserError, match=r"^a.json: row 5: got \d+ text tokens, the limit is 9; shorten [^\n]*$"
    ):
        encode_within(nano_processor(), sample(TURNS), 9)


def test_a_longer_sample_is_dropped_with_its_reason():
    result = encode_within(nano_processor(), sample(TURNS), 9, "drop_sample")
    assert result == Dropped(f"got {length(TURNS)} text tokens, the limit is 9", too_long=True)


@pytest.mark.parametrize(("kept", "left_images", "turns"), [(5, 3, 1), (3, 1, 2)])
def test_dropped_turns_lose_their_images(kept, left_images, turns):
    limit = length(TURNS[: kept + 2]) - 1
    result = encode_within(nano_processor(), sample(TURNS), limit, "drop_turns")
    first = encode(nano_processor(), TURNS[:kept])
    assert (result.input_ids, result.labels, result.images) == (first.input_ids, first.labels, left_images)
    assert result.cut.turns == turns and result.cut.images == 3 - left_images
    assert result.cut.tokens == length(TURNS) - len(first.input_ids)


def test_a_first_exchange_that_does_not_fit_drops_the_sample():
    assert isinstance(
        encode_within(nano_processor(), sample(TURNS), length(TURNS[:3]) - 1, "drop_turns"), Dropped
    )


def test_dropped_chunks_of_a_document_lose_their_images():
    whole = CHUNKS[0]["content"]
    for blocks_kept, images in ((3, 1), (5, 2)):
        part = [{"role": DOCUMENT, "content": whole[:blocks_kept]}]
        result = encode_within(nano_processor(), sample(CHUNKS), length(part), "drop_turns")
        assert result.input_ids == encode(nano_processor(), part).input_ids
        assert (result.images, result.cut.images, result.cut.turns) == (images, 4 - images, 4 - images)


@pytest.mark.parametrize("name", [*TEMPLATES, "document"])
@given(st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_text_is_cut_at_its_end_and_never_between_an_image_and_its_text(name, limit):
    processor = nano_processor(TEMPLATES[name][0] if name in TEMPLATES else None)
    messages = TURNS if name in TEMPLATES else CHUNKS
    whole = encode(processor, messages)
    result = encode_within(processor, sample(messages), limit, "truncate_text")
    if isinstance(result, Dropped):
        assert all(label == IGNORED for label in whole.labels[1:limit]) or limit < len(whole.input_ids)
        return
    kept = len(result.input_ids)
    assert (
        kept <= limit and result.input_ids == whole.input_ids[:kept] and result.labels == whole.labels[:kept]
    )
    assert result.images == result.input_ids.count(processor.image_token_id)
    assert (
        result.cut.tokens == len(whole.input_ids) - kept and result.cut.images == whole.images - result.images
    )
    if result.images:
        last = kept - result.input_ids[::-1].index(processor.image_token_id)
        assert processor.tokenizer.decode(result.input_ids[last:], skip_special_tokens=True).strip()
    if kept < min(limit, len(whole.input_ids)):  # an image was cut with its text
        assert whole.input_ids[kept] == processor.image_token_id


@pytest.mark.parametrize("policy", ["drop_sample", "drop_turns", "truncate_text"])
def test_a_sample_without_labels_is_dropped_or_refused(policy):
    without_loss = sample([user("a"), {**assistant("b"), "loss": False}])
    result = encode_within(nano_processor(), without_loss, 100, policy)
    assert result == Dropped("no assistant text to train on")
    with pytest.raises(UserError, match="^a.json: row 5: no assistant text to train on; remove[^\n]*$"):
        encode_within(nano_processor(), without_loss, 100, "error")
    cut = encode_within(nano_processor(), sample([user("long " * 30), assistant("b")]), 20, "truncate_text")
    assert isinstance(cut, Dropped) and cut.too_long


def test_encoded_counts_the_images_that_are_kept():
    assert isinstance(encode_within(nano_processor(), sample(TURNS), 500), Encoded)
    assert encode_within(nano_processor(), sample(TURNS), 500).images == 3
