"""Training in stages: a run starts from an adapter, model or checkpoint, which becomes part of its base."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flamingo_ft.adapters import load_adapter, save_adapter, write_composition
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.merging import merge_adapter
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS
from flamingo_ft.model.tiles import Tiling

from ..regimes import LORA, NOTHING_WHOLE, REGIMES, build, logits, quantized, shake, write_start

LORA_ONLY = REGIMES["LoRA only"]


@pytest.mark.parametrize("what", ["an adapter", "a merged model"])
def test_a_second_stage_starts_where_the_first_ended(small_run, what):
    expected = logits(*load_adapter("start"))
    if what == "a merged model":
        merge_adapter("start", "merged", dtype=torch.float32)
    start = {"an adapter": "start", "a merged model": "merged"}[what]
    torch.testing.assert_close(logits(*build(f"model.init_from={start}")), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logits(*build(*LORA_ONLY, f"model.init_from={start}")), expected, rtol=0, atol=1e-5
    )


def test_tiles_added_to_a_bridge_change_nothing_until_their_places_are_trained(small_run):
    tiles = "data.tiles={max: 4}"
    expected = logits(*load_adapter("start"))
    model, processor = build(tiles, "model.init_from=start")
    assert torch.equal(logits(model, processor), expected)
    shake(model)
    save_adapter(model, processor, Path("tiled"))
    loaded = load_adapter("tiled")
    assert torch.equal(logits(*loaded), logits(model, processor))
    assert loaded[1].image_processor.tiling == Tiling(4)


def test_tiles_may_be_added_to_an_adapter_that_builds_on_a_bridge(small_run):
    model, processor = build(*LORA_ONLY)
    shake(model)
    save_adapter(model, processor, Path("first"))
    expected = logits(model, processor)
    lora = [override for override in LORA_ONLY if not override.startswith("trainable=")]
    tiled, processor = build(*lora, "data.tiles={max: 4}", "model.init_from=first")
    torch.testing.assert_close(logits(tiled, processor), expected, rtol=0, atol=1e-5)
    shake(tiled)
    save_adapter(tiled, processor, Path("second"))
    assert torch.equal(logits(*load_adapter("second")), logits(tiled, processor))


TILED = "data.tiles {max: 4, size: auto, thumbnail: true} (the recipe has "
OTHER_TILES = {
    "model.init_from=tiled": TILED + "null); give the recipe the same",
    "data.tiles={max: 6}": TILED + "{max: 6, size: auto, thumbnail: true}); give the recipe the same",
    "data.tiles={max: 4, thumbnail: false}": TILED + "{max: 4, size: auto, thumbnail: false}); give",
    "data.tiles={max: 4, tags: none}": "trained with data.tiles.tags learned (the recipe has none); give",
}


def test_a_run_divides_images_as_its_start_does(small_run):
    save_adapter(*build("data.tiles={max: 4}", "model.init_from=start"), Path("tiled"))
    for override, message in OTHER_TILES.items():
        with pytest.raises(UserError, match=re.escape(message)):
            build("model.init_from=tiled", override)


def test_all_settings_that_differ_from_the_start_are_named_at_once_and_no_others(small_run):
    save_adapter(*build("data.tiles={max: 4}", "model.perceiver=null"), Path("tiled"))
    wrong = ("model.media_visibility=all_preceding", "model.cross_attention.heads=3")
    with pytest.raises(UserError) as error:
        build("model.init_from=tiled", *wrong)
    assert str(error.value).endswith(
        f"tiled was trained with {TILED}null), model.media_visibility immediate (the recipe has "
        "all_preceding), model.perceiver.depth 0 (the recipe has 1), model.cross_attention.heads 2 (the "
        "recipe has 3); give the recipe the same"
    )


def test_sizes_that_a_perceiver_without_layers_does_not_use_may_differ_from_the_starts(small_run):
    model, processor = build("model.perceiver={depth: 0, num_latents: 5}")
    shake(model)
    save_adapter(model, processor, Path("first"))
    second = build("model.perceiver={depth: 0, num_latents: 7}", "model.init_from=first")
    assert torch.equal(logits(*second), logits(model, processor))


def test_places_of_tiles_that_would_stay_at_zero_are_refused(small_run):
    with pytest.raises(UserError, match="data.tiles.tags: the bridge of model.init_from was trained without"):
        build("data.tiles={max: 4}", *LORA_ONLY)
    build("data.tiles={max: 4, tags: none}", *LORA_ONLY)


def test_a_run_that_starts_from_a_composition_shares_that_base(small_run):
    model, processor = build(*LORA_ONLY)
    save_adapter(model, processor, Path("first"))
    write_composition("first", "base")
    shutil.rmtree("start")
    other, _ = build(*LORA_ONLY, "model.init_from=base")
    assert torch.equal(logits(other, processor), logits(model, processor))
    assert other.config.bridge_init["sha256"] == model.config.bridge_init["sha256"]
    save_adapter(other, processor, Path("second"))
    write_composition("second", "again")
    for path in Path("base").iterdir():
        assert path.read_bytes() == (Path("again") / path.name).read_bytes(), path.name
    write_start(Path("whole"))
    write_composition("whole", "bare")
    with pytest.raises(UserError, match="has no bridge; leave it out"):
        build("model.init_from=bare")


def test_a_second_stage_may_quantize_what_the_first_did_not(small_run):
    model, processor = build(*LORA_ONLY, *quantized("nf4", "LoRA only"))
    shake(model)
    save_adapter(model, processor, Path("adapter"))
    assert torch.equal(logits(*load_adapter("adapter")), logits(model, processor))


def test_the_lora_of_the_first_stage_is_trained_further(small_run):
    write_start(small_run / "first", LORA)
    expected = logits(*load_adapter("first"))
    torch.testing.assert_close(logits(*build(LORA, "model.init_from=first")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("second", "message"), [((), "r 4, the recipe none"), (("lora.language={r: 8}",), "r 4, the recipe 8")]
)
def test_the_lora_of_the_first_stage_is_not_lost_silently(small_run, second, message):
    write_start(small_run / "first", LORA)
    with pytest.raises(
        UserError, match=f"first has LoRA with {message}; give the recipe the same lora section"
    ):
        build(*second, "model.init_from=first")


def test_lora_that_was_folded_into_a_backbone_is_not_lost_silently(small_run):
    write_start(small_run / "first", LORA)
    merge_adapter("first", "merged", dtype=torch.float32)
    with pytest.raises(UserError, match="LoRA was folded into the backbones of .*merged, and would be lost"):
        build("model.init_from=merged")


def test_a_third_stage_builds_on_the_second_and_the_first(small_run):
    part = "trainable={perceiver: false, cross_attention: true, new_tokens: false}"
    second, processor = build(part, "model.init_from=start")
    shake(second)
    save_adapter(second, processor, Path("second"))
    assert all("gated_cross_attn_layers" in name for name in load_file(Path("second", ADAPTER_WEIGHTS)))
    third, _ = build(NOTHING_WHOLE, LORA, "model.init_from=second")
    torch.testing.assert_close(logits(third, processor), logits(second, processor), rtol=0, atol=1e-5)
    shake(third)
    save_adapter(third, processor, Path("third"))
    assert torch.equal(logits(*load_adapter("third")), logits(third, processor))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("model.cross_attn_every_n_layers=2",),
            "start was trained with model.cross_attn_every_n_layers 1 (the recipe has 2); ",
        ),
        (
            ("model.perceiver.num_latents=4",),
            "start was trained with model.perceiver.num_latents 3 (the recipe has 4); ",
        ),
        (("model.vision={name: ViT-S-32-alt}",), "start belongs to another vision backbone, nano"),
    ],
)
def test_a_bridge_of_another_shape_or_other_backbones_is_refused(small_run, overrides, message):
    with pytest.raises(UserError) as error:
        build("model.init_from=start", *overrides)
    assert f"model.init_from: {small_run}/{message}" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_a_model_is_refused(small_run):
    Path("empty").mkdir()
    with pytest.raises(UserError, match="empty holds no adapter, merged model or checkpoint"):
        build("model.init_from=empty")


def test_a_bridge_that_moved_is_found_at_the_given_path(small_run):
    model, processor = build(*LORA_ONLY)
    shake(model)
    save_adapter(model, processor, Path("adapter"))
    shutil.move("start", "elsewhere")
    message = (
        r"adapter: builds on the bridge of .*start, which is not there \(looked at .*/start\); put it beside"
    )
    with pytest.raises(UserError, match=message):
        load_adapter("adapter")
    with pytest.raises(UserError, match="no folder elsewher; did you mean elsewhere?"):
        load_adapter("adapter", start="elsewher")
    assert torch.equal(logits(*load_adapter("adapter", start="elsewhere")), logits(model, processor))


def test_lora_that_is_trained_further_is_not_initialized_again(small_run):
    write_start(small_run / "first", LORA)
    expected = logits(*load_adapter("first"))
    for how in ("pissa", "eva"):
        actual = logits(*build(LORA, "model.init_from=first", f"lora.init_lora_weights={how}"))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["none", "nf4"])
def test_a_frozen_bf16_bridge_is_loaded_in_bf16(small_run, form):
    more = quantized(form, "LoRA only") if form != "none" else ()
    model, processor = build(*LORA_ONLY, *more, "trainable.dtype=bf16")
    shake(model)
    save_adapter(model, processor, Path("adapter"))
    loaded, _ = load_adapter("adapter")
    assert loaded.perceiver.latents.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, processor), logits(model, processor))


def test_starting_from_an_adapter_whose_base_changed_is_refused(small_run):
    part = "trainable={perceiver: false, cross_attention: true, new_tokens: false}"
    save_adapter(*build(part, "model.init_from=start"), Path("second"))
    shutil.rmtree("start")
    write_start(small_run / "start", "train.seed=5")
    with pytest.raises(
        UserError,
        match="second: base mismatch: the adapter was trained on a bridge with SHA-256 .* in .*start",
    ):
        build("model.init_from=second")


@pytest.mark.slow
def test_starting_from_a_model_that_was_written_quantized_is_refused(small_run):
    merge_adapter("start", "merged", quantization=Quantization("nf4"), margin=2.0)
    with pytest.raises(UserError, match="merged was written quantized; start from the adapter"):
        build("model.init_from=merged")


def test_runs_that_were_moved_together_still_load(small_run):
    Path("runs").mkdir()
    shutil.move("start", "runs/start")
    model, processor = build(*LORA_ONLY[:-1], "model.init_from=runs/start")
    shake(model)
    save_adapter(model, processor, Path("runs/second"))
    third, _ = build(*LORA_ONLY[:-1], "model.init_from=runs/second")
    save_adapter(third, processor, Path("runs/third"))
    shutil.move("runs", "moved")
    assert torch.equal(logits(*load_adapter("moved/third")), logits(third, processor))


def test_an_adapter_on_an_open_flamingo_checkpoint_can_be_built_on(small_run):
    model, processor = build()
    shake(model, 0.3)
    names = {"gated_cross_attn_layers.": "lang_encoder.model.layers.", "perceiver.": "perceiver."}
    checkpoint = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            if name.startswith(ours):
                number, _, rest = name.removeprefix(ours).partition(".")
                block = (
                    f"{number}.gated_cross_attn_layer.{rest}" if "gated" in ours else name.removeprefix(ours)
                )
                checkpoint[theirs + block] = tensor
    torch.save(checkpoint, "checkpoint.pt")
    second, _ = build(*LORA_ONLY[:-1], "model.init_from=checkpoint.pt")
    shake(second)
    save_adapter(second, processor, Path("second"))
    third, _ = build(*LORA_ONLY[:-1], "model.init_from=second")
    torch.testing.assert_close(logits(third, processor), logits(second, processor), rtol=0, atol=1e-5)
    assert torch.equal(third.perceiver.latents, model.perceiver.latents)


def test_a_bridge_that_changed_is_refused(small_run):
    save_adapter(*build(*LORA_ONLY), Path("adapter"))
    tensors = load_file(Path("start", ADAPTER_WEIGHTS))
    name = next(name for name in tensors if name.endswith("latents"))
    save_file({**tensors, name: tensors[name] + 1}, Path("start", ADAPTER_WEIGHTS))
    with pytest.raises(
        UserError, match="base mismatch: the adapter was trained on a bridge with SHA-256 .*, got .* in "
    ):
        load_adapter("adapter")


def test_an_adapter_records_what_it_builds_on(small_run):
    save_adapter(*build(*LORA_ONLY), Path("adapter"))
    record = json.loads(Path("adapter", "config.json").read_text())["bridge_init"]
    assert record["path"] == str(small_run / "start") and len(record["sha256"]) == 64
    card = Path("adapter", "README.md").read_text()
    assert "bridge of `start`" in card and str(small_run) not in card
