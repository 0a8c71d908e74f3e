"""A folder of images is read whole, unless its folders are splits."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from flamingo_ft.config import DataSource
from flamingo_ft.data import read_samples
from flamingo_ft.data.sample import message_text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def captions(folder: Path, names: list[str], **source) -> dict[str, str]:
    """Write images and return the caption of each as it is read, by the image's name in the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    samples = read_samples(DataSource(path=folder, **source))
    return {str(Path(s.images[0]).relative_to(folder)): message_text(s.messages[0]).strip() for s in samples}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["vehicles/train_1.png", "vehicles/car.png", "animals/cat.png"],
        ["train/a.png", "car/test.png", "car/eval-2.png"],
        ["tools/test.png", "toys/b.png", "toys/.hidden.png"],
    ],
)
def test_names_like_splits_among_pictures_and_classes_leave_no_picture_out(tmp_path, names, streaming):
    expected = {name: name.partition("/")[0] for name in names if "/." not in name}
    assert captions(tmp_path / "pictures", names, streaming=streaming) == expected


@pytest.mark.parametrize("above", ["", "photos/"])
def test_folders_of_splits_are_splits(tmp_path, above):
    names = ["train/cat/1.png", "train/dog/2.png", "Test/cat/3.png", "Test/dog/4.png"]
    names = [above + name for name in names]
    train = {above + "train/cat/1.png": "cat", above + "train/dog/2.png": "dog"}
    test = {above + "Test/cat/3.png": "cat", above + "Test/dog/4.png": "dog"}
    assert captions(tmp_path / "pictures", names) == train
    assert captions(tmp_path / "pictures", names, split="test") == test
