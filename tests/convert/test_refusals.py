"""What cannot be converted whole is refused in one line, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flamingo_ft import cli
from flamingo_ft.adapters import save_adapter
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.convert import Backbones, export_open_flamingo, export_otter, import_checkpoint
from flamingo_ft.errors import UserError
from flamingo_ft.model import build_flamingo

from . import foreign

BRIDGE = "lang_encoder.model.layers.1.gated_cross_attn_layer."


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if name not in key}


def with_(name, tensor):
    return lambda tensors: tensors | {name: tensor}


WRONG = {
    "a missing gate": (without(f"{BRIDGE}attn_gate"), {}, "lacks 1 weights of the bridge"),
    "no perceiver": (without("perceiver."), {}, "no whole bridge"),
    "other names": (lambda _: {"model.weight": torch.ones(2)}, {}, "no checkpoint of a known format.*model.weight"),
    "an unknown tensor": (with_("lang_encoder.model.layers.0.decoder_layer.extra", torch.ones(2)), {}, "no place for .*extra"),
    "a longer vocabulary": (with_("lang_encoder.lm_head.weight", torch.ones(200, 32)), {}, r"\(200, 32\), wanted \(128, 32\)"),
    "a shorter one": (with_("lang_encoder.model.embed_tokens.weight", torch.ones(127, 32)), {}, "vocabulary ends at 127"),
    "an adapter of changed layers": (
        with_("lang_encoder.model.norm.weight", torch.ones(32)), {"to": "adapter"}, "1 tensors of the backbones.*--to model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_checkpoint_that_does_not_fit(wrong, backbones, tmp_path):
    change, options, words = WRONG[wrong]
    source = foreign.save(tmp_path / "checkpoint.pt", change(foreign.open_flamingo("llama")))
    with pytest.raises(UserError, match=words) as error:
        import_checkpoint(source, tmp_path / "out", backbones["llama"], **options)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_backbones_of_another_checkpoint(backbones, tmp_path):
    source = foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo("llama"))
    with pytest.raises(UserError, match="decoder layers are at model.layers, this model's at transformer.blocks"):
        import_checkpoint(source, tmp_path / "out", backbones["mpt"])
    with pytest.raises(UserError, match="tower tokens of width 32, nano has"):
        import_checkpoint(source, tmp_path / "out", Backbones(backbones["llama"].language, "nano"))
    with pytest.raises(UserError, match="does not tell its language model for certain: name it with --language"):
        import_checkpoint(source, tmp_path / "out")


def test_lora_needs_what_it_builds_on_and_its_alpha(backbones, tmp_path):
    tensors = foreign.multimodal_gpt("llama")
    below = foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo_1("llama"))
    bare = foreign.save(tmp_path / "mmgpt.pt", tensors)
    with pytest.raises(UserError, match="LoRA alone.*--start"):
        import_checkpoint(bare, tmp_path / "out", backbones["llama"])
    with pytest.raises(UserError, match="without lora_alpha.*--lora-alpha"):
        import_checkpoint(bare, tmp_path / "out", backbones["llama"], start=below)
    import_checkpoint(bare, tmp_path / "out", backbones["llama"], start=below, lora_alpha=4)
    uneven = tensors | {name: t[:1] for name, t in tensors.items() if "layers.0" in name and "lora_A" in name}
    with pytest.raises(UserError, match=r"ranks \[1, 2\]"):
        source = foreign.save_multimodal_gpt(tmp_path / "uneven.pt", uneven)
        import_checkpoint(source, tmp_path / "other", backbones["llama"], start=below)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"perceiver": {"num_latents": 3}}, "makes model.perceiver .* alone, found"),
        ({"media_visibility": "all_preceding"}, "has no media_visibility all_preceding"),
        ({"cross_attention": {"heads": 2}}, "makes model.cross_attention"),
    ],
)
def test_a_bridge_that_the_others_do_not_make(options, words, backbones, tmp_path):
    vision, language = load_vision(backbones["llama"].vision), load_language(backbones["llama"].language)
    save_adapter(*build_flamingo(vision, language, **options), tmp_path / "adapter")
    for export in (export_open_flamingo, export_otter):
        with pytest.raises(UserError, match=words):
            export(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_tells_what_it_found_and_what_is_wrong(backbones, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo("llama"))
    names = ["--language", backbones["llama"].language, "--vision", backbones["llama"].vision]
    assert cli.main(["convert", "checkpoint.pt", "adapter", *names]) == 0
    out = capsys.readouterr().out
    assert "OpenFlamingo v2 checkpoint -> adapter" in out and "perceiver: 69 tensors" in out
    assert cli.main(["convert", "adapter", "back.pt", "--to", "open_flamingo"]) == 0
    assert cli.main(["convert", "adapter", "otter", "--to", "otter"]) == 0
    assert Path("back.pt").is_file() and Path("otter/config.json").is_file()
    capsys.readouterr()
    for arguments in (["checkpoint.pt", "adapter", *names], ["nowhere.pt", "new"], ["adapter", "back.pt", "--to", "otter"]):
        assert cli.main(["convert", *arguments]) == 2
        assert capsys.readouterr().err.startswith("error: ")
