"""Boxes in answers are returned in pixels of the original image, and boxes of prompts are read in pixels."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from flamingo_ft.cli import main
from flamingo_ft.data.sample import Video, message_text
from flamingo_ft.errors import UserError
from flamingo_ft.inference import answer as one_answer
from flamingo_ft.inference import generate
from flamingo_ft.inference.batch import answer_rows
from flamingo_ft.inference.generate import generate_file
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.inference.prompts import make_prompt
from flamingo_ft.inference.prompts_of_data import Row

ANSWER = "There: [250, 100, 500, 1000], not [900, 0, 100, 1]."


@pytest.fixture(scope="module")
def predictor(folders):
    return Predictor.from_pretrained(folders[0] / "adapter", max_new_tokens=4)


@pytest.fixture
def asked(predictor, monkeypatch):
    """Let every question be answered with `ANSWER`; return the prompts."""
    prompts = []

    def answer(self, questions, **_):
        prompts.extend(message_text(question.messages[-1]) for question in questions)
        return [ANSWER] * len(questions)

    monkeypatch.setattr(Predictor, "answer", answer)
    for module in (generate, one_answer):
        monkeypatch.setattr(module.Predictor, "from_pretrained", lambda *_, **options: predictor)
    return prompts


@pytest.fixture
def picture(tmp_path):
    """A picture of 80 x 40 pixels, of which the tower sees the middle 40 x 40."""
    Image.new("RGB", (80, 40), (90, 10, 10)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("form", [str, lambda path: path, Image.open, lambda path: path.read_bytes()])
def test_boxes_in_an_answer_are_pixels_of_the_image(form, predictor, picture):
    assert predictor.boxes_in(ANSWER, form(picture)) == [pytest.approx((30, 4, 40, 40))]
    assert predictor.boxes_in("[1, 2, 3]", picture) == []


def test_boxes_on_a_video_are_refused(predictor, picture):
    with pytest.raises(UserError, match="^boxes: not supported on videos; use an image$"):
        predictor.boxes_in(ANSWER, Video(frames=(str(picture),)))


def test_a_box_in_pixels_becomes_text_for_a_prompt(predictor, picture):
    assert predictor.box_text((30, 4, 40, 40), picture) == "[250, 100, 500, 1000]"
    with pytest.raises(UserError, match="outside of what the model sees of an image of 80 x 40 pixels"):
        predictor.box_text((0, 0, 10, 10), picture)
    with pytest.raises(UserError, match="outside of its image of 80 x 40 pixels"):
        predictor.box_text((0, 0, 10, 100), picture)


def test_generate_prints_the_boxes_in_pixels(asked, picture, capsys):
    assert main(["generate", "adapter", "--image", str(picture), "--prompt", "Where?"]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\nin pixels of a.png: [30, 4, 40, 40]\n"


def write(file, *rows):
    file.write_text("".join(json.dumps({"image": "a.png"} | row) + "\n" for row in rows))
    return file


def test_generate_reads_and_writes_boxes_in_pixels(asked, folders, picture, tmp_path):
    rows = {"question": "What is at <box>?", "boxes": [[30, 4, 40, 40]]}, {"question": "Where?"}
    data, out = write(tmp_path / "rows.jsonl", *rows), tmp_path / "answers.jsonl"
    generate_file(folders[0] / "adapter", data, out)
    assert asked == ["What is at [250, 100, 500, 1000]?", "Where?"]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["boxes"] for record in records] == [[[30, 4, 40, 40]]] * 2
    assert records[0]["prompt"] == "<image>What is at [250, 100, 500, 1000]?"


def test_boxes_are_on_the_image_of_the_reference(asked, folders, picture, tmp_path):
    Image.new("RGB", (400, 400)).save(tmp_path / "b.png")
    row = {"images": ["a.png", "b.png"], "image": None, "question": "Where?", "answer": "<box>",
           "boxes": [{"box": [0.1, 0.1, 0.2, 0.2], "image": 1}]}  # fmt: skip
    data, out = write(tmp_path / "rows.jsonl", row), tmp_path / "answers.csv"
    generate_file(folders[0] / "adapter", data, out, box_unit="relative")
    (record,) = csv.DictReader(out.open(newline=""))
    assert json.loads(record["boxes"]) == [[100, 40, 200, 400]]
    assert record["reference"] == "[100, 100, 200, 200]"


def test_an_answer_about_a_video_has_no_boxes(asked, folders, picture, tmp_path):
    rows = {"question": "Where?", "image": None, "video": ["a.png", "a.png"]}, {"question": "Where?"}
    data, out = write(tmp_path / "rows.jsonl", *rows), tmp_path / "answers.jsonl"
    generate_file(folders[0] / "adapter", data, out)
    video, image = (json.loads(line) for line in out.read_text().splitlines())
    assert (video["answer"], "boxes" in video, image["boxes"]) == (ANSWER, False, [[30, 4, 40, 40]])


@pytest.mark.parametrize("cache_mib", [0, 1])
@pytest.mark.parametrize("tiles, box", [(None, [30, 4, 40, 40]), ({"max_tiles": 2}, [20, 4, 40, 40])])
def test_boxes_are_placed_without_reading_the_image_again(
    tiles, box, cache_mib, predictor, picture, monkeypatch
):
    def answer(self, questions, **_):
        self.media.of(questions)
        picture.unlink(missing_ok=True)
        return [ANSWER] * len(questions)

    monkeypatch.setattr(Predictor, "answer", answer)
    monkeypatch.setattr(predictor.processor.image_processor, "tiles", tiles)
    asked = Predictor(predictor.model, predictor.processor, image_cache_mib=cache_mib)
    rows = [Row(f"row {number}", make_prompt([str(picture)], "Where?")) for number in range(2)]
    records = []
    answer_rows(asked, rows, SimpleNamespace(rows=0, write=records.extend))
    assert [record["boxes"] for record in records] == [[box]] * 2


def test_a_bad_box_of_a_row_is_its_error(asked, folders, picture, tmp_path):
    rows = {"question": "At <box>?", "boxes": [[0, 0, 9, 9]]}, {"question": "Where?"}
    data, out = write(tmp_path / "rows.jsonl", *rows), tmp_path / "answers.jsonl"
    summary = generate_file(folders[0] / "adapter", data, out, skip_bad=True)
    assert (summary.answered, summary.skipped) == (1, 1)
    first = json.loads(out.read_text().splitlines()[0])
    assert "row 0: boxes[0]: outside of what the model sees" in first["error"]


def test_the_demo_shows_the_boxes_of_an_answer(predictor, picture):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'flamingo_ft[demo]'")
    from flamingo_ft.data.drawing import COLOURS, PREDICTED
    from flamingo_ft.inference.demo.answer_boxes import with_picture
    from flamingo_ft.inference.demo.dialogue import Turn, messages_of
    from flamingo_ft.inference.demo.switchable_model import Answer

    turns = (Turn("Where?", (str(picture),)), Turn("And now?"))
    answer = with_picture(predictor, turns, Answer(ANSWER, ()))
    *_, text, shown = messages_of((Turn("And now?", answer=answer),))
    assert text["content"] == ANSWER
    drawn = Image.open(shown["content"]["path"])
    assert drawn.size == (160, 80) and drawn.getpixel((61, 50)) == tuple(
        bytes.fromhex(COLOURS[PREDICTED][1:])
    )
    assert with_picture(predictor, turns, Answer("Nowhere.", ())).picture is None
