"""Preference samples as TRL's DPOTrainer takes them; what it cannot take is refused."""

import pytest
from PIL import Image

from flamingo_ft.data.media_resolver import lossless_bytes
from flamingo_ft.data.pairs import preference_row
from flamingo_ft.data.sample import Sample, Video
from flamingo_ft.errors import UserError

from .dialogues import IMAGE, assistant, system, user

PICTURE = Image.new("RGB", (8, 8))


def pair(messages, rejected, images=("a.png",)) -> Sample:
    return Sample(messages, list(images), "other", "a.json: row 3", rejected)


def test_the_prompt_ends_with_the_last_question():
    before = [system("Be brief."), user(IMAGE, "Which?"), assistant("Seven."), user("Sure?")]
    better = {**assistant("Yes."), "loss": None}
    row = preference_row(pair([*before, better], [assistant("No.")], [lossless_bytes(PICTURE)]))
    (image,) = row.pop("images")
    assert row == {"prompt": before, "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}
    assert image.tobytes() == PICTURE.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("sample", "complaint"),
    [
        (pair([user(IMAGE, "a"), assistant("b")], None), "rejected: missing"),
        (
            pair([user(IMAGE, "a"), assistant("b")], [user("c")]),
            "rejected: does not end with an assistant message",
        ),
        (pair([user(IMAGE, "a")], [assistant("c")]), "chosen: does not end with an assistant message"),
        (pair([user("a"), assistant(IMAGE, "b")], [assistant("c")]), "chosen: got an image in the answer"),
        (
            pair([user(IMAGE, "a"), assistant("b")], [assistant("c")], [Video(file="a.mp4")]),
            "images: got a video",
        ),
    ],
)
def test_what_is_no_pair_of_text_answers_is_refused(sample, complaint):
    with pytest.raises(UserError, match=f"^a.json: row 3: {complaint}[^\n]*$"):
        preference_row(sample)
