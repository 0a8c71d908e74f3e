"""`check` reports boxes that cannot be used, draws the others, and `recipes new` finds out their unit."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageColor

from flamingo_ft.check.new_recipe import RecipeOptions, write_new_recipe
from flamingo_ft.data.drawing import COLOURS, REFERENCE

from .small_recipes import checked, write_rows


@pytest.fixture(autouse=True)
def no_histograms(monkeypatch):
    monkeypatch.setattr("flamingo_ft.check.check_data.save_histograms", lambda report, folder: {})


@pytest.fixture
def folder(tmp_path):
    for name, color in {"a": "black", "b": "white"}.items():
        Image.new("RGB", (200, 100), color).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"damaged")
    return tmp_path


def row(box, image="a.png", **more):
    return {"image": image, "question": "Where?", "answer": "<box>", "boxes": [box], **more}


def test_check_lists_every_row_whose_box_cannot_be_used(folder):
    rows = [row([60, 10, 90, 50]), row([0, 0, 20, 50]), row([150, 10, 290, 50]), row([1, 2, 3, 4], "c.png")]
    report = checked(folder, [write_rows(folder / "rows.jsonl", rows)])
    problems = [f"{one.row} {one.field}: {one.problem}" for one in report.first_problems]
    assert report.problems == 3 and report.parts[0].samples == 1
    assert problems[0].startswith("1 boxes[0]: outside of what the model sees of an image of 200 x 100")
    assert problems[1].startswith("2 boxes[0]: outside of its image of 200 x 100 pixels, got [150.0, 10.0,")
    assert problems[2].startswith("3 image 1 of 1: ") and "c.png: not a readable image" in problems[2]


@pytest.mark.parametrize("data", [{}, {"tiles": {"max": 4}}], ids=["cropped", "tiles"])
def test_boxes_that_the_crop_cuts_off_are_counted_in_a_warning(folder, data):
    rows = [row([30, 10, 90, 50]), row([60, 10, 140, 90]), row([140, 0, 180, 50]), row([49, 0, 90, 9])]
    source = write_rows(folder / "rows.jsonl", rows)
    report = checked(folder, [source], eval=[source], **data)
    page = (folder / "check" / "check.html").read_text()
    assert report.objection is None and report.parts[0].boxes == 4
    lines = [line for line in report.warnings if "the tower's crop" in line]
    if data:
        assert lines == [] and "the model sees the middle" not in page
        return
    # Of 200 x 100 pixels the tower sees columns 50 to 150.
    assert [part.cut_boxes for part in report.parts] == [2, 2]
    assert lines == [
        "the tower's crop to the middle of the image cuts off 4 of 8 boxes; set model.vision.resize_mode to "
        "squash or longest, or data.tiles"
    ]
    assert "Ready to train" not in page and "the model sees the middle 50 %" in page


def test_images_much_larger_than_the_towers_input_are_noted_unless_there_are_tiles(folder, capsys):
    source = write_rows(folder / "rows.jsonl", [{"image": "a.png", "question": "What?", "answer": "Black."}])
    (note,) = checked(folder, [source]).notes
    assert note.startswith("images have 200 x 100 pixels (medians), and the tower sees each in 32 x 32;")
    assert "set data.tiles" in note and note[1:] in (folder / "check" / "check.html").read_text()
    assert checked(folder, [source], tiles={"max": 4}).notes == []
    Image.new("RGB", (100, 100)).save(folder / "a.png")
    assert checked(folder, [source]).notes == []


def test_check_draws_the_boxes(folder):
    checked(folder, [write_rows(folder / "rows.jsonl", [row([60, 10, 90, 50]), row([60, 10, 140, 90])])])
    page = (folder / "check" / "check.html").read_text()
    assert page.count("1 box, drawn in blue") == 2
    (first, _) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    drawn = Image.open(io.BytesIO(base64.b64decode(first))).convert("RGB")
    blue = ImageColor.getrgb(COLOURS[REFERENCE])
    left, top = (round(side * drawn.width / 200) for side in (60, 10))
    seen = drawn.getpixel((left + 1, top + 15))
    assert all(abs(ours - theirs) < 60 for ours, theirs in zip(seen, blue, strict=True)), seen
    assert max(drawn.getpixel((left + 12, top + 15))) < 60


@pytest.mark.parametrize("box, unit", [([60, 10, 90, 50], None), ([0.3, 0.1, 0.5, 0.5], "relative")])
def test_a_new_recipe_has_the_unit_of_the_boxes(box, unit, folder, monkeypatch):
    monkeypatch.chdir(folder)
    write_rows(
        folder / "rows.jsonl", [row(box, name, question=f"Where, {name}?") for name in ("a.png", "b.png")]
    )
    assert write_new_recipe(Path("new.yaml"), RecipeOptions(data=Path("rows.jsonl"))) == []
    recipe = yaml.safe_load(Path("new.yaml").read_text())
    assert recipe["data"]["train"][0].get("box_unit") == unit
    assert recipe["eval"]["max_new_tokens"] >= 26
