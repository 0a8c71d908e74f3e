"""Samples with too many tokens: what each policy leaves, and that no image is left without its text."""

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
def test_a_sample_that_fits_stays_as_it_is(policy):
    found = encode_within(nano_processor(), sample(TURNS), length(TURNS), policy)
    assert found == encode(nano_processor(), TURNS)


def test_a_longer_sample_is_an_error_that_says_where():
    with pytest.raises(
        UserError, match=r"^a.json: row 5: got \d+ text tokens, the limit is 9; shorten [^\n]*$"
    ):
        encode_within(nano_processor(), sample(TURNS), 9)


def test_a_longer_sample_is_dropped_with_its_reason():
    found = encode_within(nano_processor(), sample(TURNS), 9, "drop_sample")
    assert found == Dropped(f"got {length(TURNS)} text tokens, the limit is 9", too_long=True)


@pytest.mark.parametrize(("kept", "left_images", "turns"), [(5, 3, 1), (3, 1, 2)])
def test_the_last_exchanges_go_with_their_images(kept, left_images, turns):
    limit = length(TURNS[: kept + 2]) - 1
    found = encode_within(nano_processor(), sample(TURNS), limit, "drop_turns")
    first = encode(nano_processor(), TURNS[:kept])
    assert (found.input_ids, found.labels, found.images) == (first.input_ids, first.labels, left_images)
    assert found.cut.turns == turns and found.cut.images == 3 - left_images
    assert found.cut.tokens == length(TURNS) - len(first.input_ids)


def test_a_first_exchange_that_does_not_fit_drops_the_sample():
    assert isinstance(
        encode_within(nano_processor(), sample(TURNS), length(TURNS[:3]) - 1, "drop_turns"), Dropped
    )


def test_a_documents_last_chunks_go_with_their_images():
    whole = CHUNKS[0]["content"]
    for blocks_kept, images in ((3, 1), (5, 2)):
        part = [{"role": DOCUMENT, "content": whole[:blocks_kept]}]
        found = encode_within(nano_processor(), sample(CHUNKS), length(part), "drop_turns")
        assert found.input_ids == encode(nano_processor(), part).input_ids
        assert (found.images, found.cut.images, found.cut.turns) == (images, 4 - images, 4 - images)


@pytest.mark.parametrize("name", [*TEMPLATES, "document"])
@given(st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_text_is_cut_at_its_end_and_never_between_an_image_and_its_text(name, limit):
    processor = nano_processor(TEMPLATES[name][0] if name in TEMPLATES else None)
    messages = TURNS if name in TEMPLATES else CHUNKS
    whole = encode(processor, messages)
    found = encode_within(processor, sample(messages), limit, "truncate_text")
    if isinstance(found, Dropped):
        assert all(label == IGNORED for label in whole.labels[1:limit]) or limit < len(whole.input_ids)
        return
    kept = len(found.input_ids)
    assert kept <= limit and found.input_ids == whole.input_ids[:kept] and found.labels == whole.labels[:kept]
    assert found.images == found.input_ids.count(processor.image_token_id)
    assert found.cut.tokens == len(whole.input_ids) - kept and found.cut.images == whole.images - found.images
    if found.images:
        last = kept - found.input_ids[::-1].index(processor.image_token_id)
        assert processor.tokenizer.decode(found.input_ids[last:], skip_special_tokens=True).strip()
    if kept < min(limit, len(whole.input_ids)):  # more was taken than had to be: an image stood there
        assert whole.input_ids[kept] == processor.image_token_id


@pytest.mark.parametrize("policy", ["drop_sample", "drop_turns", "truncate_text"])
def test_a_sample_without_labels_never_trains(policy):
    silent = sample([user("a"), {**assistant("b"), "loss": False}])
    found = encode_within(nano_processor(), silent, 100, policy)
    assert found == Dropped("no assistant text to train on")
    with pytest.raises(UserError, match="^a.json: row 5: no assistant text to train on; remove[^\n]*$"):
        encode_within(nano_processor(), silent, 100, "error")
    cut = encode_within(nano_processor(), sample([user("long " * 30), assistant("b")]), 20, "truncate_text")
    assert isinstance(cut, Dropped) and cut.too_long


def test_encoded_says_how_many_images_are_kept():
    assert isinstance(encode_within(nano_processor(), sample(TURNS), 500), Encoded)
    assert encode_within(nano_processor(), sample(TURNS), 500).images == 3
