"""Boxes in rows become text that says where they are in what the model sees; nothing else changes."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from flamingo_ft.backbones.tower import to_picture
from flamingo_ft.config import AugmentationSection, DataSection, DataSource
from flamingo_ft.data import encode, open_data, preference_row, read_samples
from flamingo_ft.data.box_writer import BoxWriter, image_size
from flamingo_ft.data.encode import IGNORED, encode_within
from flamingo_ft.data.examples import Example, ExampleDataset, SkippedRow
from flamingo_ft.data.media import PixelLoader
from flamingo_ft.data.pairs import encode_pair
from flamingo_ft.data.sample import Video, message_text, with_widest_boxes
from flamingo_ft.data.sample_order import SampleIndex
from flamingo_ft.data.sources import open_source
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.questions import questions_of
from flamingo_ft.model import FlamingoImageProcessor, FlamingoProcessor
from flamingo_ft.model.boxes import parse_boxes

from .dialogues import nano_processor

BOX, OTHER = [8, 12, 24, 30], [40, 20, 60, 44]  # on a picture of 80 x 60
TEXT, OTHER_TEXT = "[100, 200, 300, 500]", "[500, 333, 750, 733]"  # when nothing is cut off
HUMAN, GPT = {"from": "human", "value": "Where? Not <box>."}, {"from": "gpt", "value": "Here: <box>"}
FORMATS = {
    "messages": {"messages": [
        {"role": "user", "content": "Where? Not <box>."}, {"role": "assistant", "content": "Here: <box>"}]},
    "messages_typed": {"messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where? Not <box>."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Here: <box>"}]}]},
    "llava": {"conversations": [HUMAN, GPT]},
    "sharegpt": {"conversations": [HUMAN, GPT], "system": "Look."},
    "prompt_completion": {"prompt": "Where? Not <box>.", "completion": "Here: <box>"},
    "vqa": {"question": "Where? Not <box>.", "answer": "Here: <box>"},
    "alpaca": {"instruction": "Where?", "input": "Not <box>.", "output": "Here: <box>"},
    "caption": {"caption": "Where? Not <box>.Here: <box>"},
    "preference": {"prompt": "Where? Not <box>.", "chosen": "Here: <box>", "rejected": "No."},
}  # fmt: skip


@pytest.fixture
def picture(tmp_path):
    """A black picture of 80 x 60 pixels that is white inside of `BOX`."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[12:30, 8:24] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def processor(mode: str = "squash", tiles: dict | None = None) -> FlamingoProcessor:
    nano = nano_processor()
    fields = {**nano.image_processor.open_clip_preprocess, "resize_mode": mode}
    return FlamingoProcessor(FlamingoImageProcessor(fields, tiles=tiles), nano.tokenizer, nano.chat_template)


def samples(folder, *rows, **entry):
    (folder / "rows.jsonl").write_text("".join(json.dumps({"image": "a.png"} | row) + "\n" for row in rows))
    return read_samples(DataSource(path=folder / "rows.jsonl", **entry))


def where_is(boxes, **row):
    return {"question": "Where?", "answer": "<box>", "boxes": boxes} | row


def text_of(sample) -> str:
    return "|".join(map(message_text, sample.messages))


@pytest.mark.parametrize("name", FORMATS)
def test_markers_become_boxes_in_every_format(name, picture):
    row = FORMATS[name] | ({"images": ["a.png"], "image": None} if name == "sharegpt" else {})
    (sample,) = samples(picture.parent, row | {"boxes": [OTHER, {"box": BOX, "image": 0}]})
    written = BoxWriter(processor().image_processor)(sample)
    separator = "\n" if name == "alpaca" else " "
    question, answer = f"Where?{separator}Not {OTHER_TEXT}.", f"Here: {TEXT}"
    joined = question + ("" if name == "caption" else "|") + answer
    assert text_of(written).removeprefix("Look.|") == joined
    assert TEXT in nano_processor().tokenizer.decode(encode(processor(), written).input_ids)
    (question,) = questions_of([written])
    shown = question.boxes + question.asked
    assert sorted(box.corners for box in shown) == [tuple(BOX), tuple(OTHER)] and written.unread == ()


def test_a_box_that_is_asked_about_is_in_the_prompt(picture):
    (sample,) = samples(picture.parent, {"question": "What is at <box>?", "answer": "A dog.", "boxes": [BOX]})
    written = BoxWriter(processor().image_processor)(sample)
    (question,) = questions_of([written])
    assert message_text(question.messages[-1]) == f"What is at {TEXT}?"
    assert ([box.corners for box in question.asked], question.boxes) == ([tuple(BOX)], ())


def test_both_answers_of_a_pair_have_boxes(picture):
    row = {"prompt": "Where?", "chosen": "<box>", "rejected": "At <box>.", "boxes": [BOX, OTHER]}
    (sample,) = samples(picture.parent, row)
    written = BoxWriter(processor().image_processor)(sample)
    assert (text_of(written), message_text(written.rejected[0])) == (f"Where?|{TEXT}", f"At {OTHER_TEXT}.")
    pair, tokenizer = encode_pair(processor(), written, 200), processor().tokenizer
    assert OTHER_TEXT in tokenizer.decode(pair.rejected.input_ids)
    (sample,) = samples(picture.parent, row | {"rejected": "<box>"})  # the same text, another box
    assert message_text(BoxWriter(processor().image_processor)(sample).rejected[0]) == OTHER_TEXT
    assert preference_row(written)["chosen"][0]["content"] == [{"type": "text", "text": TEXT}]


def test_relative_boxes_are_fractions_of_the_upright_image(picture):
    relative = [0.1, 0.2, 0.3, 0.5]
    (sample,) = samples(picture.parent, where_is([relative]), box_unit="relative")
    assert text_of(BoxWriter(processor().image_processor)(sample)) == f"Where?|{TEXT}"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: upright it is 60 pixels wide and 80 high
    Image.open(picture).save(picture, exif=exif)
    assert image_size(str(picture)) == (60, 80)
    (sample,) = samples(picture.parent, where_is([[30, 8, 48, 24]]))
    assert text_of(BoxWriter(processor().image_processor)(sample)) == "Where?|[500, 100, 800, 300]"


@pytest.mark.parametrize("mode, expected", [
    ("shortest", "[0, 200, 233, 500]"),  # 80 x 60 is cut to its middle 60 x 60
    ("longest", "[100, 281, 300, 500]"),  # and padded to 80 x 80
    ("squash", TEXT),
])  # fmt: skip
def test_a_box_is_that_of_what_the_tower_sees(mode, expected, picture):
    (sample,) = samples(picture.parent, where_is([BOX]))
    (box,) = parse_boxes(text_of(BoxWriter(processor(mode).image_processor)(sample)))
    (other,) = parse_boxes(expected)
    assert box == pytest.approx(other, abs=0.02)  # the tower's input has 32 pixels


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_with_tiles_a_box_is_that_of_the_whole_image(mode, picture):
    (sample,) = samples(picture.parent, where_is([BOX]))
    tiled = processor(mode, {"max_tiles": 4})
    assert text_of(BoxWriter(tiled.image_processor)(sample)) == f"Where?|{TEXT}"


BAD = [
    (where_is([[8, 12, 24]]), "boxes[0]: expected [x1, y1, x2, y2], got 3 values"),
    (where_is([8, 12, 24, 30]), "boxes[0]: expected [x1, y1, x2, y2], got a number"),
    (where_is([[8, 12, 24, "30"]]), "boxes[0]: expected [x1, y1, x2, y2] of finite numbers, got text"),
    (where_is([[8, 12, 24, float("nan")]]), "boxes[0]: expected [x1, y1, x2, y2] of finite numbers, got nan"),
    (where_is([[24, 12, 8, 30]]),
     "boxes[0]: expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2, got [24.0, 12.0, 8.0, 30.0]"),
    (where_is([[0.1, 0.2, 0.3, 0.5]]),
     "boxes[0]: smaller than a pixel, got [0.1, 0.2, 0.3, 0.5]; set box_unit to relative"),
    (where_is([BOX, BOX]),
     "boxes: got 1 <box> marker but 2 boxes; write one marker for each, in their order"),
    (where_is([]), "boxes: got 1 <box> marker but 0 boxes; write one marker for each, in their order"),
    (where_is([{"box": BOX, "image": 1}]),
     "boxes[0].box: no such image, got number 1 in a row of 1 image; count them from 0"),
    (where_is([{"box": BOX, "image": "a.png"}]),
     "boxes[0].image: expected the number of an image, from 0, got text"),
    (where_is([BOX], answer=None, answers=["<box>", "there: <box>"]),
     "<box> in one of several reference answers; give the row one answer"),
    (where_is([BOX], image=None, video=["a.png", "a.png"]),
     "boxes[0]: not supported on videos, got image 0; use an image"),
]  # fmt: skip


@pytest.mark.parametrize("row, problem", BAD, ids=[problem[:40] for _, problem in BAD])
def test_a_bad_box_is_reported_in_one_line(row, problem, picture):
    with pytest.raises(UserError) as error:
        samples(picture.parent, row)
    assert str(error.value) == f"{picture.parent / 'rows.jsonl'}: row 0: {problem}"


def test_a_relative_box_above_1_is_reported(picture):
    with pytest.raises(UserError, match=r"boxes\[0\]: expected fractions from 0 to 1, got .*; set box_unit"):
        samples(picture.parent, where_is([BOX]), box_unit="relative")


def test_a_box_beyond_its_image_is_reported_and_rounding_is_forgiven(picture):
    write = BoxWriter(processor().image_processor)
    outside, rounded = samples(picture.parent, where_is([[70, 12, 99, 30]]), where_is([[-0.5, 0, 80.7, 60]]))
    with pytest.raises(
        UserError, match=r"row 0: boxes\[0\]: outside of its image of 80 x 60 pixels, got \[70"
    ):
        write(outside)
    assert text_of(write(rounded)) == "Where?|[0, 0, 1000, 1000]"


@pytest.mark.parametrize("box", [[80, 12, 81, 30], [8, -1, 24, 0]])
def test_a_box_that_is_only_within_the_tolerance_has_no_area(box, picture):
    (sample,) = samples(picture.parent, where_is([box]))
    with pytest.raises(UserError) as error:
        BoxWriter(processor().image_processor)(sample)
    assert "boxes[0]: no area inside its image of 80 x 60 pixels, got [" in str(error.value)
    assert str(error.value).endswith("; correct or remove it") and "resize_mode" not in str(error.value)


def test_text_keeps_its_marker_in_a_row_without_the_column(picture):
    row = {"question": "Where?", "answer": "<box>(1,2),(3,4)</box>"}
    (sample,) = samples(picture.parent, row)
    assert text_of(sample) == "Where?|<box>(1,2),(3,4)</box>" and sample.boxes == ()
    assert BoxWriter(processor().image_processor)(sample) is sample


def test_lengths_are_measured_with_the_longest_box(picture):
    (sample,) = samples(picture.parent, where_is([BOX]))
    assert text_of(with_widest_boxes(sample)) == "Where?|[1000, 1000, 1000, 1000]"
    with pytest.raises(UserError, match="content block: got type 'box'"):
        encode(processor(), sample)


@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_a_box_that_is_not_seen_makes_the_row_bad_in_evaluation(on_bad_sample, picture):
    (sample,) = samples(picture.parent, where_is([[0, 0, 6, 30]]))
    entry = DataSource(path=picture.parent / "rows.jsonl")
    data = open_data(DataSection(train=(entry,), eval=(entry,), on_bad_sample=on_bad_sample), seed=0)
    problem = "boxes[0]: outside of what the model sees of an image of 80 x 60 pixels"
    if on_bad_sample == "error":
        with pytest.raises(UserError, match=re.escape(problem)):
            data.with_boxes_written([sample], processor("shortest"))
        return
    assert data.with_boxes_written(data.eval_samples(), processor("shortest")) == []
    assert problem in data.skipped[sample.where]


# Training with augmentation.


def dataset(folder, loader, **entry):
    source = open_source(
        DataSource(path=folder / "rows.jsonl", **entry), DataSection(train=(DataSource(path=folder),))
    )
    write = BoxWriter(loader.processor.image_processor, loader)

    def tokens(sample):
        return encode_within(loader.processor, sample, 200)

    return ExampleDataset([source], tokens, loader, write)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("tiles", [None, {"max_tiles": 4}], ids=["", "tiles"])
def test_the_text_says_where_the_augmented_picture_has_it(mode, tiles, picture):
    samples(picture.parent, where_is([BOX]))
    loader = PixelLoader(processor(mode, tiles), AugmentationSection(crop=0.5, flip=0.5, color=0.1), seed=3)
    examples, images = dataset(picture.parent, loader), loader.processor.image_processor
    texts = set()
    for number in range(30):
        example = examples[SampleIndex(number, 0, 0)]
        assert isinstance(example, Example)
        ids = [token for token in example.encoded.labels if token != IGNORED]
        ((left, top, right, bottom),) = parse_boxes(loader.processor.tokenizer.decode(ids))
        texts.add((left, top, right, bottom))
        pixels = to_picture(images.open_clip_preprocess, example.media[0].values[0]).numpy()[..., 0] / 255
        height, width = pixels.shape
        inside = pixels[
            round(top * height + 1) : round(bottom * height - 1),
            round(left * width + 1) : round(right * width - 1),
        ]
        assert inside.min() > 0.6  # white where the text says
        expected = (right - left) * (bottom - top) * pixels.size
        assert abs((pixels > 0.4).sum() - expected) < 0.35 * expected + 8
    assert len(texts) > 20


def test_a_crop_never_cuts_off_most_of_a_box(picture):
    samples(picture.parent, where_is([[0, 0, 10, 60]]), {"question": "Where?", "answer": "No."})
    loader = PixelLoader(processor(), AugmentationSection(crop=0.2), seed=0)
    examples = dataset(picture.parent, loader)
    writer = BoxWriter(loader.processor.image_processor, loader)
    boxed, plain = read_samples(picture.parent / "rows.jsonl")
    sizes = []
    for number in range(60):
        (geometry,) = writer(boxed, number).geometries
        assert geometry.visible_area((0, 0, 10, 60)) >= 300
        (augmentation,) = [loader.augmentation_of(boxed, number, 0, (80, 60))]
        sizes.append(augmentation.crop[2:])
        assert loader.augmentation_of(plain, number, 0, (80, 60)).crop[2:] != (1, 1)
        assert isinstance(examples[SampleIndex(number, 0, 0)], Example)
    assert 5 < sizes.count((1, 1)) < 60  # some crops keep it, the others are left out


def test_a_row_whose_box_is_never_seen_is_bad_in_training(picture):
    samples(picture.parent, where_is([[0, 0, 6, 30]]))
    loader = PixelLoader(processor("shortest"), AugmentationSection(crop=0.5))
    row = dataset(picture.parent, loader)[SampleIndex(0, 0, 0)]
    assert isinstance(row, SkippedRow) and row.bad and "outside of what the model sees" in row.reason


def test_boxes_change_neither_the_draw_nor_other_samples(picture):
    samples(picture.parent, {"question": "Where?", "answer": "Here."}, where_is([[0, 0, 80, 60]]))
    loader = PixelLoader(processor(), AugmentationSection(crop=0.9, flip=0.5, color=0.3), seed=5)
    plain, boxed = read_samples(picture.parent / "rows.jsonl")
    for number in range(5):
        pixels = [
            loader(sample, 1, number)[0].values for sample in (plain, replace(boxed, images=plain.images))
        ]
        assert pixels[0].equal(pixels[1])


def test_a_stream_and_a_table_hold_boxes_too(picture):
    (picture.parent / "rows.csv").write_text(f'image,question,answer,boxes\na.png,Where?,<box>,"[{BOX}]"\n')
    (sample,) = read_samples(picture.parent / "rows.csv")
    assert [box.corners for box in sample.boxes] == [tuple(BOX)]
    samples(picture.parent, where_is([BOX]))
    (sample,) = read_samples(DataSource(path=picture.parent / "rows.jsonl", streaming=True))
    assert [box.corners for box in sample.boxes] == [tuple(BOX)]
    assert not isinstance(sample.images[0], Video)
