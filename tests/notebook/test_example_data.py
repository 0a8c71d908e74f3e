"""Example data is read as the forms that it stands for."""

from __future__ import annotations

from PIL import Image

from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data import open_source, read_samples
from flamingo_ft.data.sample import display_text
from flamingo_ft.notebook import write_box_data, write_example_data


def test_example_data_are_a_table_and_llava_dialogues_about_images_of_one_folder(tmp_path):
    folder = write_example_data(tmp_path / "data", rows=3)
    shown = []
    for name, schema in (("questions.csv", "vqa"), ("dialogues.json", "llava")):
        source = DataSource(path=folder / name, image_root=folder / "images")
        assert open_source(source, DataSection(train=(source,))).format == schema
        samples = read_samples(source)
        assert len(samples) == 3
        assert all(display_text(sample.messages[0]).endswith("What is this?") for sample in samples)
        assert all(display_text(sample.messages[1]) for sample in samples)
        shown += [str(image) for sample in samples for image in sample.images]
    assert len({*shown}) == 6


def test_boxes_are_around_the_digits(tmp_path):
    file = write_box_data(tmp_path / "boxes", 4)
    for sample in read_samples(file):
        (image,), (box,) = sample.images, sample.boxes
        corners = box.pixels(96, 96)
        page = Image.open(str(image)).convert("L")
        assert page.crop(corners).getextrema()[1] > 100
        page.paste(0, tuple(map(int, corners)))
        assert page.getextrema() == (0, 0)
    assert file.read_text() == write_box_data(tmp_path / "again", 4).read_text()
    assert file.read_text() != write_box_data(tmp_path / "others", 4, seed=1).read_text()
