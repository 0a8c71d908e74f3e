"""Content hashes change only with the content; the license is the one stated on the model card."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from flamingo_ft.backbones.language import SMALL_FILES, load_language
from flamingo_ft.backbones.provenance import (
    MODEL_CARD,
    files_sha256,
    license_in,
    license_on_hub,
    tensors_sha256,
)
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.errors import UserError
from tests.hub_server import Repository


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as transformers saves it."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 4}')
    (model / "tokenizer.json").write_text('{"vocab": {"a": 0}}')
    (model / "tokenizer_config.json").write_text("{}")
    save_file({"weight": torch.arange(4.0)}, model / "model.safetensors")
    return model


def test_a_module_and_its_state_dict_in_any_order_have_the_same_hash():
    module = nn.Linear(3, 2)
    backwards = dict(reversed(list(module.state_dict().items())))
    assert tensors_sha256(module) == tensors_sha256(backwards) == tensors_sha256(module)


def test_memory_layout_does_not_change_the_hash():
    tensor = torch.arange(6.0).reshape(2, 3)
    strided = tensor.t().contiguous().t()
    assert tensors_sha256({"w": tensor}) == tensors_sha256({"w": strided})


@pytest.mark.parametrize(
    "changed",
    [
        {"w": torch.tensor([1.0, 2.0, 3.0, 5.0])},
        {"v": torch.tensor([1.0, 2.0, 3.0, 4.0])},
        {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])},
        {"w": torch.tensor([1.0, 2.0, 3.0, 4.0]).view(torch.int32)},
        {"w": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16)},
        {"w": torch.tensor([1.0, 2.0, 3.0, 4.0]), "x": torch.zeros(0)},
    ],
    ids=["value", "name", "shape", "dtype-same-bytes", "dtype", "one-more-tensor"],
)
def test_any_change_of_tensors_changes_the_hash(changed):
    assert tensors_sha256({"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}) != tensors_sha256(changed)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16])
def test_every_dtype_and_scalars_can_be_hashed(dtype):
    ones, zeros = {"w": torch.ones((), dtype=dtype)}, {"w": torch.zeros((), dtype=dtype)}
    assert tensors_sha256(ones) != tensors_sha256(zeros)


def test_meta_tensors_are_refused():
    with pytest.raises(ValueError, match="w is on the meta device"):
        tensors_sha256({"w": torch.empty(2, device="meta")})


def test_a_copy_of_a_folder_has_the_same_hash(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "another" / "path"))
    os.utime(copy / "config.json", (1, 1))
    assert files_sha256(copy) == files_sha256(str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_changed_byte_changes_the_hash(folder, file):
    before = files_sha256(folder)
    with (folder / file).open("ab") as stream:
        stream.write(b" ")
    assert files_sha256(folder) != before


@pytest.mark.parametrize(
    "extra",
    [
        "README.md",
        ".git/config.json",
        ".cache/huggingface/model.safetensors",
        "original/model.pth",
        "generation_config.json",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "vocab.json",
    ],
)
def test_files_that_are_not_loaded_do_not_change_the_hash(folder, extra):
    before = files_sha256(folder)
    (folder / extra).parent.mkdir(parents=True, exist_ok=True)
    (folder / extra).write_text("anything")
    assert files_sha256(folder) == before


def test_every_shard_of_an_index_changes_the_hash(folder):
    (folder / "model.safetensors").unlink()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name, shard in shards.items():
        save_file({name: torch.zeros(2)}, folder / shard)
    before = files_sha256(folder)
    save_file({"b": torch.ones(2)}, folder / shards["b"])
    assert files_sha256(folder) != before
    (folder / shards["b"]).unlink()
    with pytest.raises(UserError, match="lists model-00002-of-00002.safetensors, which does not exist"):
        files_sha256(folder)


def test_a_hub_snapshot_has_the_hash_of_its_files_without_reading_the_large_ones(folder, tmp_path):
    """The cache's own layout: links into `blobs`, large files named by SHA-256, small ones by a git hash."""
    snapshot, blobs = tmp_path / "models--org--name/snapshots/0a1b", tmp_path / "models--org--name/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        content = file.read_bytes()
        large = file.suffix == ".safetensors"
        blob = blobs / (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        blob.write_bytes(b"not read" if large else content)
        (snapshot / file.name).symlink_to(blob)
    assert files_sha256(snapshot) == files_sha256(folder)


@pytest.mark.parametrize("case", ["missing", "empty"])
def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path, case):
    folder = tmp_path / case
    if case == "empty":
        folder.mkdir()
    with pytest.raises(UserError) as caught:
        files_sha256(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\n---\n# A model", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\nlicense_link: https://example.org\n---\n", "llama3"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags: [a]\n---\n", None),
        ("# No metadata", None),
        ("---\nlicense: [unclosed\n---\n", None),
        ("---\n- a list\n---\n", None),
        (None, None),
    ],
)
def test_the_license_is_what_the_model_card_states(tmp_path, card, license):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_in(tmp_path) == license


def test_the_nano_backbones_have_the_packages_license():
    assert load_vision("nano").license == load_language("nano").license == "apache-2.0"


def test_the_license_of_an_unreachable_repository_is_none(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert license_on_hub("nobody/nothing", None) is None


def test_the_card_of_a_repository_is_downloaded_for_its_license(hub):
    repository = hub.repositories.setdefault("org/tower", Repository(private=False))
    oid = hub.store(b"---\nlicense: other\nlicense_name: openrail\n---\n")
    lines = [
        {"key": "header", "value": {"summary": "put"}},
        {"key": "lfsFile", "value": {"path": "README.md", "oid": oid}},
    ]
    repository.branches.setdefault("main", [])
    hub.commit(repository, "main", lines)
    assert license_on_hub("org/tower", None) == "openrail"
    assert MODEL_CARD in SMALL_FILES, "the card of a language model is downloaded with its other small files"
