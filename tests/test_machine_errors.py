"""A failing machine is never reported as a damaged file, nor a bug as a full disk."""

from __future__ import annotations

import errno
import os
import zipfile

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from flamingo_ft import cli, machine_errors
from flamingo_ft.adapters.files import read_safetensors
from flamingo_ft.backbones import language as language_module
from flamingo_ft.backbones.language import NANO_FOLDER, load_language
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.formats import stored_files
from flamingo_ft.hub.errors import error_reason

GPU_FULL = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 14.56 GiB"


def gpu_is_full(*_, **__):
    raise torch.OutOfMemoryError(GPU_FULL)


def gpu_is_broken(*_, **__):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def disk_is_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/file")


@pytest.mark.parametrize("fails", [gpu_is_full, gpu_is_broken])
class TestLoading:
    def test_a_language_model_does_not_load_as_damaged(self, fails, monkeypatch):
        monkeypatch.setattr(language_module.AutoModelForCausalLM, "from_pretrained", fails)
        with pytest.raises(RuntimeError, match="CUDA"):
            load_language("nano")

    def test_a_wrapped_error_is_still_found(self, fails, monkeypatch):
        def wrapped(*_, **__):
            try:
                fails()
            except RuntimeError as error:
                raise ValueError("could not load") from error

        monkeypatch.setattr(language_module.AutoModelForCausalLM, "from_pretrained", wrapped)
        with pytest.raises(RuntimeError, match="CUDA"):
            load_language("nano")

    @pytest.mark.parametrize("verbosity", ["warning", "error"])
    def test_quantizing_a_weight_does_not_hide_the_reason(self, fails, monkeypatch, verbosity):
        """transformers replaces any error there by one without the cause, and only logs the cause."""
        before = transformers.logging.get_verbosity()
        getattr(transformers.logging, f"set_verbosity_{verbosity}")()
        monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", fails)
        try:
            with pytest.raises(RuntimeError, match="CUDA"):
                load_language("nano", quantization=Quantization("nf4"))
        finally:
            transformers.logging.set_verbosity(before)

    @pytest.mark.parametrize("quantization", [None, Quantization("int8")], ids=["unquantized", "int8"])
    def test_a_tower_does_not_load_as_mismatched(self, quantization, fails, monkeypatch):
        monkeypatch.setattr("flamingo_ft.backbones.vision.load_visual_state_dict", fails)
        monkeypatch.setattr("open_clip.create_model", fails)
        with pytest.raises(RuntimeError, match="CUDA"):
            load_vision("nano", quantization=quantization)

    def test_a_checkpoint_is_not_reported_as_damaged(self, fails, monkeypatch, tmp_path):
        torch.save({"weight": torch.ones(2)}, tmp_path / "checkpoint.pt")
        monkeypatch.setattr(stored_files.torch, "load", fails)
        with pytest.raises(RuntimeError, match="CUDA"):
            stored_files.load_torch_file(tmp_path / "checkpoint.pt")


def test_a_damaged_language_model_is_still_one_line(tmp_path):
    for file in NANO_FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="does not load"):
        load_language(str(tmp_path))


@pytest.mark.parametrize("entry", ["data.pkl", "archive/other"])
def test_a_zip_that_is_not_a_checkpoint_is_reported_as_damaged_and_not_as_a_full_disk(tmp_path, entry):
    """torch's reader names the same source file as its writer does for a full disk."""
    with zipfile.ZipFile(tmp_path / "checkpoint.pt", "w") as archive:
        archive.writestr(entry, b"content")
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        stored_files.load_torch_file(tmp_path / "checkpoint.pt")


def test_an_adapter_without_read_permission_is_not_reported_as_damaged(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "config.json")

    monkeypatch.setattr("flamingo_ft.adapters.files.FlamingoProcessor.from_pretrained", forbidden)
    from flamingo_ft.adapters.files import read_processor

    with pytest.raises(PermissionError):
        read_processor(tmp_path)
    save_file({"weight": torch.ones(2)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_safetensors(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("error", "is_disk"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), True),
        (
            RuntimeError(
                "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/3"
            ),
            True,
        ),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"), True),
        (
            RuntimeError(
                "[enforce fail at inline_container.cc:257] . file in archive is not in a subdirectory"
            ),
            False,
        ),
        (
            RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"),
            False,
        ),
        (SafetensorError("Error while deserializing header: header too small"), False),
        (
            RuntimeError(
                "1 trained parameters would not be saved, among them perceiver.latents; nothing written"
            ),
            False,
        ),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1: unhandled cuda error"), False),
        (OSError(errno.ENOENT, "No such file or directory"), False),
    ],
)
def test_a_full_disk_is_distinguished_from_other_errors(error, is_disk):
    assert bool(machine_errors.disk_failure(error)) == is_disk


def test_a_download_that_fills_the_disk_asks_for_room():
    with pytest.raises(OSError) as error:
        disk_is_full()
    assert "make room" in error_reason(error.value) and "/cache/file" in error_reason(error.value)


@pytest.mark.parametrize(
    ("fails", "line"), [(gpu_is_full, "GPU memory is full"), (disk_is_full, "/cache/file")]
)
def test_every_command_reports_full_memory_and_a_full_disk_in_a_line(
    fails, line, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr("flamingo_ft.evaluation.evaluate.evaluate_adapter", fails)
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert line in capsys.readouterr().err


def test_any_other_error_of_a_command_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr("flamingo_ft.evaluation.evaluate.evaluate_adapter", gpu_is_broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cli.main(["eval", str(tmp_path)])
