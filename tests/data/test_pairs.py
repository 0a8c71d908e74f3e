"""Preference pairs: both halves are encoded alike, and only the answers have labels."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from flamingo_ft.data.encode import IGNORED, Cut, Dropped, encode
from flamingo_ft.data.examples import Example
from flamingo_ft.data.media import PixelLoader
from flamingo_ft.data.media_resolver import lossless_bytes
from flamingo_ft.data.pairs import encode_pair, preference_row
from flamingo_ft.data.sample import Sample, Video
from flamingo_ft.errors import UserError
from flamingo_ft.training.dataloader import collate_preferences

from .dialogues import IMAGE, TEMPLATES, assistant, nano_processor, system, user

BEFORE = [system("Be brief."), user(IMAGE, "Which?"), assistant("Seven."), user("Are you sure of that?")]


def pair(chosen="Yes, I am.", rejected="No.", before=BEFORE) -> Sample:
    images = [
        lossless_bytes(Image.new("RGB", (32, 32), (40 * number, 9, 90)))
        for number in range(sum(block == IMAGE for message in before for block in message["content"]))
    ]
    return Sample([*before, assistant(chosen)], images, "other", "a.json: row 3", [assistant(rejected)])


def halves(sample: Sample, template=None):
    """Token ids of both whole texts."""
    worse = [*sample.messages[:-1], *sample.rejected]
    return [encode(nano_processor(template), text).input_ids for text in (sample.messages, worse)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_compared_answers_have_labels(name):
    template, written = TEMPLATES[name]
    processor = nano_processor(template)
    result = encode_pair(processor, pair(), 500)
    for half, ids, answer in zip(
        (result.chosen, result.rejected), halves(pair(), template), ("Yes, I am.", "No."), strict=True
    ):
        assert half.input_ids == ids
        labelled = [label for label in half.labels if label != IGNORED]
        assert processor.tokenizer.decode(labelled).strip() == written(answer).strip()
    assert (result.images, result.cut) == (1, Cut())
    assert result.label_tokens == result.chosen.label_tokens + result.rejected.label_tokens


@pytest.mark.parametrize("policy", ["error", "drop_sample", "drop_turns", "truncate_text"])
def test_a_pair_that_fits_is_unchanged(policy):
    limit = max(map(len, halves(pair())))
    assert encode_pair(nano_processor(), pair(), limit, policy) == encode_pair(nano_processor(), pair(), 500)


@pytest.mark.parametrize("policy", ["drop_sample", "drop_turns"])
@pytest.mark.parametrize("answers", [("Yes, I am.", "No."), ("No.", "Yes, I am.")])
def test_one_half_that_is_too_long_drops_both(policy, answers):
    sample = pair(*answers)
    result = encode_pair(nano_processor(), sample, max(map(len, halves(sample))) - 1, policy)
    assert isinstance(result, Dropped) and result.too_long


def test_the_error_of_a_too_long_pair_names_its_row():
    with pytest.raises(
        UserError, match=r"^a.json: row 3: got \d+ text tokens, the limit is 9; shorten [^\n]*$"
    ):
        encode_pair(nano_processor(), pair(), 9)


def test_answers_are_truncated_separately_and_keep_the_images():
    long, short = (len(ids) for ids in halves(pair()))
    result = encode_pair(nano_processor(), pair(), short, "truncate_text")
    assert [len(half.input_ids) for half in (result.chosen, result.rejected)] == [short, short]
    assert (result.images, result.cut) == (1, Cut(tokens=long - short))


def test_answers_with_the_same_tokens_are_not_a_pair():
    sample = pair("Yes. I am.", "Yes. I do.")
    long = len(halves(sample)[0])
    results = [encode_pair(nano_processor(), sample, limit, "truncate_text") for limit in (long, long - 5)]
    assert not isinstance(results[0], Dropped) and isinstance(results[1], Dropped) and results[1].too_long
    with pytest.raises(
        UserError, match="^a.json: row 3: chosen and rejected have the same tokens; remove the row$"
    ):
        encode_pair(nano_processor(), pair("Yes.", "Yes."), 500)


def test_a_batch_equals_that_of_trls_collator():
    processor = nano_processor()
    two = [user(IMAGE, "One.", IMAGE, "Are they the same digit?")]
    samples = [pair(), pair("Seven.", "It is a two.", [user(IMAGE, "Which?")]), pair("Yes.", "No.", two)]
    load = PixelLoader(processor)
    rows = []
    for number, sample in enumerate(samples):
        encoded = encode_pair(processor, sample, 500)
        rows.append([Example(sample.where, encoded, load(sample, encoded.images, number))])
    ours = collate_preferences(processor.tokenizer.pad_token_id, None, rows)
    theirs = DataCollatorForVisionPreference(processor)(
        [copy.deepcopy(preference_row(sample)) for sample in samples]
    )
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=0)
    assert {*ours} == {*theirs}
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(ours[name], theirs[name]), name
    # TRL's mask also covers the line break that the template writes after the answer's end token.
    last = theirs["attention_mask"].sum(1, keepdim=True) - 1
    assert torch.equal(ours["completion_mask"], theirs["completion_mask"].scatter(1, last, 0))


PICTURE = Image.new("RGB", (8, 8))


def sample_of(messages, rejected, images=("a.png",)) -> Sample:
    return Sample(messages, list(images), "other", "a.json: row 3", rejected)


def test_the_prompt_ends_with_the_last_question():
    before = [system("Be brief."), user(IMAGE, "Which?"), assistant("Seven."), user("Sure?")]
    better = {**assistant("Yes."), "loss": None}
    row = preference_row(sample_of([*before, better], [assistant("No.")], [lossless_bytes(PICTURE)]))
    (image,) = row.pop("images")
    assert row == {"prompt": before, "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}
    assert image.tobytes() == PICTURE.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("sample", "complaint"),
    [
        (sample_of([user(IMAGE, "a"), assistant("b")], None), "rejected: missing"),
        (
            sample_of([user(IMAGE, "a"), assistant("b")], [user("c")]),
            "rejected: does not end with an assistant message",
        ),
        (sample_of([user(IMAGE, "a")], [assistant("c")]), "chosen: does not end with an assistant message"),
        (
            sample_of([user("a"), assistant(IMAGE, "b")], [assistant("c")]),
            "chosen: got an image in the answer",
        ),
        (
            sample_of([user(IMAGE, "a"), assistant("b")], [assistant("c")], [Video(file="a.mp4")]),
            "images: got a video",
        ),
    ],
)
def test_samples_that_are_not_pairs_of_text_answers_are_refused(sample, complaint):
    with pytest.raises(UserError, match=f"^a.json: row 3: {complaint}[^\n]*$"):
        preference_row(sample)
