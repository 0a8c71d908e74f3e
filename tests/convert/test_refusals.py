"""A conversion that would lose something is refused in one line, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flamingo_ft import cli
from flamingo_ft.adapters import load_adapter, save_adapter
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


LM = "lang_encoder.model."
WRONG = {
    "a missing gate": (without(f"{BRIDGE}attn_gate"), {}, "lacks 1 weights of the bridge"),
    "no perceiver": (without("perceiver."), {}, "no whole bridge"),
    "other names": (
        lambda _: {"model.weight": torch.ones(2)},
        {},
        "not a checkpoint of a known format.*model.weight",
    ),
    "an unknown tensor": (
        with_(f"{LM}layers.0.decoder_layer.extra", torch.ones(2)),
        {},
        "no place for .*extra",
    ),
    "a longer vocabulary": (
        with_("lang_encoder.lm_head.weight", torch.ones(200, 32)),
        {},
        r"\(200, 32\), expected \(128, 32\)",
    ),
    "a shorter one": (
        with_(f"{LM}embed_tokens.weight", torch.ones(127, 32)),
        {},
        "vocabulary ends at 127",
    ),
    "an adapter of changed layers": (
        with_(f"{LM}norm.weight", torch.ones(32)),
        {"to": "adapter"},
        "1 tensors of the backbones.*--to model",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_checkpoint_that_does_not_fit_is_refused(wrong, backbones, tmp_path):
    change, options, words = WRONG[wrong]
    source = foreign.save(tmp_path / "checkpoint.pt", change(foreign.open_flamingo("llama")))
    with pytest.raises(UserError, match=words) as error:
        import_checkpoint(source, tmp_path / "out", backbones["llama"], **options)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_backbones_of_another_checkpoint_are_refused(backbones, tmp_path):
    source = foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo("llama"))
    with pytest.raises(
        UserError, match="decoder layers are at model.layers, this model's at transformer.blocks"
    ):
        import_checkpoint(source, tmp_path / "out", backbones["mpt"])
    with pytest.raises(UserError, match="tower tokens of width 32, nano has"):
        import_checkpoint(source, tmp_path / "out", Backbones(backbones["llama"].language, "nano"))
    with pytest.raises(
        UserError, match="the checkpoint's language model is not certain; name it with --language"
    ):
        import_checkpoint(source, tmp_path / "out")


def test_the_deprecated_keyword_wanted_warns_and_works(backbones, tmp_path):
    source = foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo("llama"))
    with pytest.warns(FutureWarning, match="wanted is now called backbones"):
        result = import_checkpoint(source, tmp_path / "adapter", wanted=backbones["llama"])
    assert result.result == "adapter"


def test_lora_needs_its_base_checkpoint_and_alpha(backbones, tmp_path):
    tensors = foreign.multimodal_gpt("llama")
    base_checkpoint = foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo_1("llama"))
    bare = foreign.save(tmp_path / "mmgpt.pt", tensors)
    with pytest.raises(UserError, match="LoRA alone.*--start"):
        import_checkpoint(bare, tmp_path / "out", backbones["llama"])
    with pytest.raises(UserError, match="does not record lora_alpha.*--lora-alpha"):
        import_checkpoint(bare, tmp_path / "out", backbones["llama"], start=base_checkpoint)
    import_checkpoint(bare, tmp_path / "out", backbones["llama"], start=base_checkpoint, lora_alpha=4)
    uneven = tensors | {name: t[:1] for name, t in tensors.items() if "layers.0" in name and "lora_A" in name}
    with pytest.raises(UserError, match=r"ranks \[1, 2\]"):
        source = foreign.save_multimodal_gpt(tmp_path / "uneven.pt", uneven)
        import_checkpoint(source, tmp_path / "other", backbones["llama"], start=base_checkpoint)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"perceiver": {"num_latents": 3}},
            r"got model.perceiver.num_latents 3 \(needs 64\); it cannot be converted",
        ),
        ({"perceiver": {"max_num_media": 3}}, r"got model.perceiver.max_num_media 3 \(needs null\); "),
        (
            {"media_visibility": "all_preceding"},
            r"got model.media_visibility all_preceding \(needs immediate",
        ),
        ({"cross_attention": {"heads": 2}}, r"got model.cross_attention.heads 2 \(needs 8\)"),
        (
            {"perceiver": {"num_latents": 8, "depth": 2}, "cross_attention": {"heads": 4, "dim_head": 32}},
            r"num_latents 8 \(needs 64\), model.perceiver.depth 2 \(needs 6\), model.cross_attention.heads 4 "
            r"\(needs 8\), model.cross_attention.dim_head 32 \(needs 64\); ",
        ),
    ],
)
def test_a_bridge_that_the_other_projects_cannot_build_is_refused(options, words, backbones, tmp_path):
    vision, language = load_vision(backbones["llama"].vision), load_language(backbones["llama"].language)
    save_adapter(*build_flamingo(vision, language, **options), tmp_path / "adapter")
    for export in (export_open_flamingo, export_otter):
        with pytest.raises(UserError, match=words):
            export(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_prints_the_summary_and_errors(backbones, tmp_path, capsys, monkeypatch):
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
    assert cli.main(["convert", "adapter", "other.pt", "--to", "open_flamingo", *names]) == 2
    assert "--language: not used with --to open_flamingo" in capsys.readouterr().err
    for arguments in (
        ["checkpoint.pt", "adapter", *names],
        ["nowhere.pt", "new"],
        ["adapter", "back.pt", "--to", "otter"],
    ):
        assert cli.main(["convert", *arguments]) == 2
        assert capsys.readouterr().err.startswith("error: ")


LORA_A, LORA_B = ".self_attn.q_proj.lora_A.default.weight", ".self_attn.q_proj.lora_B.default.weight"
LAYER = "lang_encoder.base_model.model.model.layers.0.decoder_layer"
INCOMPLETE = {
    "LoRA without lora_B": (without(f"layers.0.decoder_layer{LORA_B}"), "lora_B"),
    "LoRA without lora_A": (without(f"layers.0.decoder_layer{LORA_A}"), "lora_B"),
    "DoRA": (
        with_(f"{LAYER}.self_attn.q_proj.lora_magnitude_vector.default.weight", torch.ones(32)),
        "magnitude",
    ),
    "another width": (with_(f"{LAYER}{LORA_A}", torch.ones(2, 48)), r"matrix of \(32, 32\), got lora_B"),
}


@pytest.mark.parametrize("wrong", INCOMPLETE)
def test_incomplete_lora_is_refused(wrong, backbones, tmp_path):
    change, words = INCOMPLETE[wrong]
    base_checkpoint = foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo_1("llama"))
    source = foreign.save_multimodal_gpt(tmp_path / "mmgpt.pt", change(foreign.multimodal_gpt("llama")))
    with pytest.raises(UserError, match=words) as error:
        import_checkpoint(source, tmp_path / "out", backbones["llama"], start=base_checkpoint)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_rows_of_new_tokens_beside_lora_are_kept(backbones, tmp_path):
    name = "lang_encoder.base_model.model.model.embed_tokens.weight"
    base_checkpoint = foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo_1("llama"))
    moved = foreign.open_flamingo("llama")["lang_encoder.model.embed_tokens.weight"].clone()
    moved[-2:] += 5
    source = foreign.save_multimodal_gpt(
        tmp_path / "mmgpt.pt", foreign.multimodal_gpt("llama") | {name: moved}
    )
    assert (
        import_checkpoint(source, tmp_path / "out", backbones["llama"], start=base_checkpoint).result
        == "adapter"
    )
    model, _ = load_adapter(tmp_path / "out")
    assert torch.equal(model.token_rows.input.weight, moved[-2:])


TOWER = "vision_encoder.vision_model."
TOWERS = {
    "an unknown tensor": (with_(f"{TOWER}extra.weight", torch.ones(2)), {}, "no place for .*extra"),
    "a lost projection": (without("layers.0.self_attn.k_proj.weight"), {}, "tower lacks k of"),
    "lost layers": (without("mlp.fc1"), {}, "its tower lacks 4 tensors"),
    "another activation": (dict, {"vision_config": {"hidden_act": "quick_gelu"}}, "computes with quick_gelu"),
}


@pytest.mark.parametrize("wrong", TOWERS)
def test_an_incomplete_otter_tower_is_refused(wrong, backbones, tmp_path):
    change, config, words = TOWERS[wrong]
    folder = foreign.save_otter(tmp_path / "otter", change(foreign.otter_whole("llama")), **config)
    with pytest.raises(UserError, match=words):
        import_checkpoint(folder, tmp_path / "out", backbones["llama"])


def test_a_model_of_this_package_is_not_a_foreign_checkpoint(backbones, tmp_path):
    source = foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo_1("llama"))
    import_checkpoint(source, tmp_path / "model", backbones["llama"], to="model")
    for place in (tmp_path / "model", tmp_path / "model" / "model.safetensors"):
        with pytest.raises(UserError, match="already in flamingo-ft's format"):
            import_checkpoint(place, tmp_path / "out", backbones["llama"])


def test_a_layer_stored_only_under_its_alias_is_not_skipped_as_a_repetition(backbones, tmp_path):
    changed = with_("lang_encoder.old_decoder_blocks.0.self_attn.q_proj.weight", torch.ones(32, 32))
    source = foreign.save(tmp_path / "checkpoint.pt", changed(foreign.open_flamingo("llama")))
    assert import_checkpoint(source, tmp_path / "out", backbones["llama"]).result == "model"


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 3}'])
def test_a_damaged_folder_is_a_one_line_error(content, backbones, tmp_path):
    folder = foreign.save_otter(tmp_path / "otter", foreign.otter_whole("llama"))
    for file in ("pytorch_model.bin.index.json", "config.json"):
        (folder / file).write_text(content)
        if content.startswith('{"') and file == "config.json":
            continue
        with pytest.raises(UserError, match=file) as error:
            import_checkpoint(folder, tmp_path / "out", backbones["llama"])
        assert "\n" not in str(error.value)


def test_tied_matrices_with_different_values_are_refused(backbones, tmp_path):
    changed = with_("lang_encoder.lm_head.weight", torch.ones(128, 32))
    source = foreign.save(tmp_path / "checkpoint.pt", changed(foreign.open_flamingo("mpt")))
    with pytest.raises(UserError, match="are tied in this language model, but differ in the checkpoint"):
        import_checkpoint(source, tmp_path / "out", backbones["mpt"])
