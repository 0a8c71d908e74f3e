"""A language model loads the same way from the package, a folder and the Hub; errors are one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, T5Config

from flamingo_ft.backbones.language import NANO_FOLDER, load_language
from flamingo_ft.backbones.provenance import files_sha256
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch
from tests.model.tiny_language_models import make_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.arange(3, 9)[None]


def save_tokenizer(folder: Path, words: str = "a b") -> None:
    vocabulary = {word: index for index, word in enumerate(["<unk>", *words.split()])}
    word_level = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=word_level, unk_token="<unk>").save_pretrained(folder)


def save_model(folder: Path, family: str = "llama", **options) -> Path:
    make_tiny(family).to(**options).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_model(tmp_path / "lm")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Callable[[str, Path], None]:
    """Return a function that puts a folder into an empty Hub cache, as revision main with commit COMMIT."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name: str, folder: Path) -> None:
        cached = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, cached / "snapshots" / COMMIT)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(COMMIT)

    return put


def refusal(name: str | Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_language(str(name), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_nano_language_model_loads_from_the_package():
    nano = load_language("nano")
    assert nano.source == {
        "name": "nano",
        "revision": None,
        "sha256": files_sha256(NANO_FOLDER),
        "quantization": None,
    }
    assert len(nano.tokenizer) <= len(nano.model.get_input_embeddings().weight)
    assert nano.tokenizer.decode(nano.tokenizer.encode("Which digit is this?")) == "Which digit is this?"


def test_a_folder_gives_the_model_saved_there_frozen(folder):
    loaded = load_language(str(folder))
    expected = make_tiny("llama")
    assert torch.equal(loaded.model(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    source = {"name": str(folder), "revision": None, "sha256": files_sha256(folder), "quantization": None}
    assert loaded.source == source


def test_a_model_in_the_cache_is_recorded_by_its_commit(folder, hub):
    hub("org/tiny", folder)
    loaded = load_language("org/tiny", local_files_only=True)
    source = {"name": "org/tiny", "revision": COMMIT, "sha256": files_sha256(folder), "quantization": None}
    assert loaded.source == source
    assert load_language("org/tiny", COMMIT, local_files_only=True).source == loaded.source


def test_the_content_hash_does_not_depend_on_the_path(folder, hub, tmp_path):
    hub("org/tiny", folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    hashes = {load_language(str(place)).source["sha256"] for place in (folder, copy)}
    assert hashes == {load_language("org/tiny", local_files_only=True).source["sha256"]}


def test_weights_are_downloaded_in_one_format_and_safetensors_first(folder, monkeypatch):
    patterns = []

    def download(name, *, allow_patterns, **options):
        patterns.append([pattern for pattern in allow_patterns if pattern in ("*.safetensors", "*.bin")])
        return str(folder)

    monkeypatch.setattr(fetch, "snapshot_download", download)
    load_language("org/tiny")
    assert patterns == [["*.safetensors"]]
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    load_language("org/tiny")
    assert patterns[1:] == [["*.safetensors"], ["*.bin"]]


def test_the_tokenizer_may_come_from_another_folder_or_repository(folder, hub, tmp_path):
    save_tokenizer(tmp_path / "words", "x y z")
    hub("org/words", tmp_path / "words")
    assert len(load_language(str(folder)).tokenizer) == 3
    for place in (str(tmp_path / "words"), "org/words"):
        assert len(load_language(str(folder), tokenizer=place, local_files_only=True).tokenizer) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the checkpoint's own dtype is the default")
def test_parameters_are_float32_by_default_without_a_gpu(tmp_path):
    folder = save_model(tmp_path / "lm", dtype=torch.bfloat16)
    assert load_language(str(folder)).model.dtype == torch.float32
    assert load_language(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./no", "no/such/folder", "~/no", "models/worsd", "models/word/"]
)
def test_a_missing_path_is_an_error_without_a_download(name, tmp_path, monkeypatch):
    monkeypatch.delattr(fetch, "snapshot_download")
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refusal(name).startswith(f"language model: no folder {name}; check the path")
    (tmp_path / "models" / "words").mkdir()
    if name.startswith("models"):
        assert f"no folder {name}; did you mean models/words?" in refusal(name)


@pytest.mark.parametrize("name", ["a b", ""])
def test_an_invalid_name_is_an_error_without_a_download(name, monkeypatch):
    monkeypatch.delattr(fetch, "snapshot_download")
    assert f"language model {name!r}: neither a folder nor a name on the Hub" in refusal(name)


@pytest.mark.parametrize(
    ("offline", "message_part"),
    [
        (False, "is not in the cache, and only the cache may be used; check the name, or give a folder"),
        (True, "HF_HUB_OFFLINE is set, and the cache is incomplete; unset it, or give a folder"),
    ],
)
def test_local_files_only_refuses_a_model_that_is_not_in_the_cache(offline, message_part, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert message_part in refusal("org/tiny", local_files_only=True)


@pytest.mark.parametrize(
    ("error", "message_part"),
    [
        (RepositoryNotFoundError, "neither a local folder nor a visible Hub repository (it may be private)"),
        (GatedRepoError, "is gated; accept its terms"),
        (RevisionNotFoundError, "though the repository is; check the revision"),
        (HfHubHTTPError, "failed (500 and more); try again"),
    ],
)
def test_errors_of_the_hub_are_one_line(error, message_part, monkeypatch):
    def download(*args, **options):
        raise error("500\nand more", response=MagicMock(headers={}, status_code=418))

    monkeypatch.setattr(fetch, "snapshot_download", download)
    message = refusal("org/tiny", revision="v2")
    assert "org/tiny (revision v2)" in message
    assert message_part in message


def test_a_revision_of_a_folder_is_an_error(folder):
    assert "revision v2" in refusal(folder, revision="v2")


def write_config(folder: Path, **config) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def remove_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message_part"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "does not load (AutoConfig)"),
        (lambda f: write_config(f, model_type="martian"), "model type `martian`"),
        (lambda f: T5Config().save_pretrained(f), "is of type 't5', which is not a causal language model"),
        (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk"), "does not load (AutoModelForCausalLM)"),
        (remove_head, "lack 1 of its tensors (lm_head.weight, ...)"),
        (lambda f: (f / "tokenizer.json").unlink(), "does not load (AutoTokenizer)"),
        (
            lambda f: write_config(f, model_type="own", auto_map={"AutoConfig": "own.Config"}),
            "pass trust_remote_code=True if you trust",
        ),
    ],
    ids=[
        *("no config", "broken config", "unknown type", "encoder-decoder", "no weights", "broken weights"),
        *("no head", "no tokenizer", "own code"),
    ],
)
def test_a_folder_without_a_causal_language_model_is_an_error_that_says_why(spoil, message_part, folder):
    spoil(folder)
    message = refusal(folder)
    assert str(folder) in message
    assert message_part in message


def test_an_encoder_is_not_a_causal_language_model(tmp_path):
    lm = make_tiny("bert")
    lm.config.is_decoder = False
    lm.save_pretrained(tmp_path)
    assert "is a bert encoder" in refusal(tmp_path)
