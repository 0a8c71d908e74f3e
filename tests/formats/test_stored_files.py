"""Torch files are loaded without running code from them."""

import argparse
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from flamingo_ft.errors import UserError
from flamingo_ft.formats.stored_files import load_torch_file


class RunsCode:
    """Creates a folder when it is unpickled by the pickle module."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class Settings(dict):
    def __init__(self, **entries):
        super().__init__(entries)
        self.place = Path("somewhere")


CONTENT = {
    "weights": {
        "half": torch.randn(3, 2, dtype=torch.bfloat16),
        "view": torch.arange(12.0).reshape(3, 4)[:, 1:].T,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "ids": torch.tensor(7),
        "quantized": torch.arange(4, dtype=torch.uint8),
    },
    "ordered": OrderedDict(a=torch.zeros(1)),
    "numbers": [1, 2.5, None, "text"],
}


def same(loaded, expected):
    if isinstance(expected, torch.Tensor):
        return loaded.dtype == expected.dtype and torch.equal(loaded, expected)
    if isinstance(expected, dict):
        return loaded.keys() == expected.keys() and all(
            same(loaded[key], value) for key, value in expected.items()
        )
    return loaded == expected


@pytest.mark.parametrize("zipped", [True, False], ids=["today's files", "files before torch 1.6"])
@pytest.mark.parametrize(
    "foreign", [{}, {"settings": Settings(rank=16), "arguments": argparse.Namespace(lr=0.1)}]
)
def test_tensors_are_loaded_unchanged_whatever_is_stored_beside_them(zipped, foreign, tmp_path):
    torch.save(CONTENT | foreign, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    loaded = load_torch_file(tmp_path / "file.pt")
    assert all(same(loaded[key], value) for key, value in CONTENT.items())
    if foreign:
        assert type(loaded["settings"]) is not Settings and loaded["settings"]["rank"] == 16
        assert loaded["arguments"]["lr"] == 0.1


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(zipped, tmp_path):
    trace = tmp_path / "the code ran"
    content = CONTENT | {
        "code": RunsCode(trace),
        "lookup": pickle.loads,
        "again": Settings(code=RunsCode(trace)),
    }
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    loaded = load_torch_file(tmp_path / "file.pt")
    assert same(loaded["weights"], CONTENT["weights"]) and not trace.exists()
    assert (
        not callable(getattr(loaded["lookup"], "__wrapped__", None)) and loaded["lookup"] is not pickle.loads
    )
    with pytest.raises(FileExistsError):  # the file is harmful: torch runs its code
        trace.mkdir()
        torch.load(tmp_path / "file.pt", weights_only=False)


def test_a_file_that_is_not_torchs_is_a_one_line_error(tmp_path):
    (tmp_path / "text.pt").write_bytes(b"no tensors here")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"code": RunsCode(tmp_path / "ran")}))
    for name, words in {
        "text.pt": "not a checkpoint",
        "raw.pt": "not a checkpoint",
        "none.pt": "no such checkpoint",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            load_torch_file(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    assert not (tmp_path / "ran").exists()
