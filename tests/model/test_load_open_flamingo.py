"""OpenFlamingo's checkpoints load whole and checked; their keys were recorded from it (tests/golden)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import get_constant_schedule_with_warmup

from flamingo_ft.errors import UserError
from flamingo_ft.model import Flamingo, FlamingoConfig, FlamingoForConditionalGeneration, load_open_flamingo
from tests.golden import cases, measurements
from tests.golden.deterministic_weights import EMBEDDINGS, fill
from tests.golden.recorded import CHECKPOINT_INTERVAL, TOLERANCE, Golden, trained_state_dict, whole_state_dict
from tests.golden.tiny_flamingo import untrained_flamingo
from tests.golden.tiny_models import EOC_TOKEN, FAMILIES, MEDIA_TOKEN, WIDTH, tiny_clip, tiny_language_model

GATE = "lang_encoder.gpt_neox.layers.1.gated_cross_attn_layer.attn_gate"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, and very much so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fresh(family: str = "gpt_neox", every: int = CHECKPOINT_INTERVAL) -> Flamingo:
    """A model to load into: its bridge untrained, its input embeddings (and a head tied to them) zero."""
    model = untrained_flamingo(family, every)
    with torch.no_grad():
        model.lang_encoder.get_input_embeddings().weight.zero_()
    return model


def assert_computes_what_was_recorded(model: Flamingo, family: str) -> None:
    with torch.no_grad():
        logits, _ = measurements.logits_and_loss(model, cases.interleaved(family), masked=False)
    assert Golden(family, CHECKPOINT_INTERVAL).distance("logits", logits) < TOLERANCE


def snapshot(model: Flamingo) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: Flamingo, before: Mapping[str, Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def training_checkpoint(state_dict: Mapping[str, Tensor]) -> dict:
    """What OpenFlamingo's training loop writes: the model beside optimizer and schedule."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=2)
    parameter.sum().backward()
    optimizer.step()
    schedule.step()
    return {
        "epoch": 0,
        "model_state_dict": dict(state_dict),
        "optimizer_state_dict": optimizer.state_dict(),
        "lr_scheduler_state_dict": schedule.state_dict(),
    }


def under_ddp(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in state_dict.items()}


WRAPPINGS = {
    "bare": lambda sd: sd,
    "bare of several devices": under_ddp,
    "training": training_checkpoint,
    "training on several devices": lambda sd: training_checkpoint(under_ddp(sd)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_checkpoint_gives_open_flamingo_s_logits(family: str) -> None:
    model, trained = fresh(family), trained_state_dict(family)
    report = load_open_flamingo(model, trained)
    assert len(report.loaded) == len(trained)
    assert not (report.unexpected or report.mismatched)
    assert set(report.missing) == set(model.state_dict()) - set(report.loaded)
    assert_computes_what_was_recorded(model, family)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_of_a_file_loads_the_same_weights(wrapping: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(WRAPPINGS[wrapping](trained_state_dict("gpt_neox")), path)
    model = fresh()
    load_open_flamingo(model, path)
    assert_computes_what_was_recorded(model, "gpt_neox")


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    torch.save(trained_state_dict("gpt_neox"), tmp_path / "checkpoint.pt")
    model = fresh()
    load_open_flamingo(model, str(tmp_path / "checkpoint.pt"))
    assert_computes_what_was_recorded(model, "gpt_neox")


def test_a_whole_state_dict_loads_the_backbones_too() -> None:
    model = fresh()
    with torch.no_grad():
        for part in (model.vision_encoder, model.lang_encoder):
            for parameter in part.parameters():
                parameter.zero_()
    report = load_open_flamingo(model, whole_state_dict())
    assert set(report.loaded) == set(model.state_dict())
    assert not (report.missing or report.unexpected or report.mismatched)
    assert_computes_what_was_recorded(model, "gpt_neox")


def test_the_transformers_api_loads_the_same_file() -> None:
    language_model = tiny_language_model("gpt_neox")
    with torch.no_grad():
        language_model.get_input_embeddings().weight.zero_()
    config = FlamingoConfig(
        text_config=language_model.config,
        vision_width=WIDTH,
        cross_attn_every_n_layers=CHECKPOINT_INTERVAL,
        media_token_id=MEDIA_TOKEN,
        eoc_token_id=EOC_TOKEN,
        new_token_ids=[EOC_TOKEN, MEDIA_TOKEN],
    )
    model = FlamingoForConditionalGeneration(config, tiny_clip().visual, language_model).eval()
    load_open_flamingo(model, trained_state_dict("gpt_neox"))
    batch = cases.interleaved("gpt_neox")
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, pixel_values=batch.vision_x).logits
    assert Golden("gpt_neox", CHECKPOINT_INTERVAL).distance("logits", logits) < TOLERANCE


def test_load_state_dict_does_the_same_for_open_flamingo_s_keys() -> None:
    model, trained = fresh(), trained_state_dict("gpt_neox")
    keys = model.load_state_dict(trained | {"lang_encoder.gpt_neox.extra": torch.zeros(1)}, strict=False)
    assert keys.unexpected_keys == ["lang_encoder.gpt_neox.extra"]
    assert keys.missing_keys
    assert all(key.startswith(("lang_encoder.", "vision_encoder.")) for key in keys.missing_keys)
    assert_computes_what_was_recorded(model, "gpt_neox")


def test_load_state_dict_with_strict_false_requires_every_bridge_weight() -> None:
    trained = trained_state_dict("gpt_neox")
    del trained[GATE]
    with pytest.raises(UserError, match="attn_gate"):
        fresh().load_state_dict(trained, strict=False)


def test_a_strict_load_state_dict_requires_the_backbones() -> None:
    with pytest.raises(RuntimeError, match="strict=False"):
        fresh().load_state_dict(trained_state_dict("gpt_neox"))
    fresh().load_state_dict(whole_state_dict())


def test_missing_input_embeddings_are_reported() -> None:
    trained = {k: v for k, v in trained_state_dict("gpt_neox").items() if not k.endswith(EMBEDDINGS)}
    assert "lang_encoder.gpt_neox.embed_in.weight" in load_open_flamingo(fresh(), trained).missing


def test_a_smaller_vocabulary_loads_and_keeps_the_other_rows() -> None:
    model, trained = fresh(), trained_state_dict("gpt_neox")
    key = embedding_key(trained)
    load_open_flamingo(model, trained | {key: trained[key][:120]})
    embeddings = model.lang_encoder.get_input_embeddings().weight
    assert torch.equal(embeddings[:120], trained[key][:120])
    assert not embeddings[120:].any()


def test_load_state_dict_accepts_the_models_own_keys() -> None:
    source, target = fresh(), untrained_flamingo("gpt_neox", CHECKPOINT_INTERVAL)
    fill(source, "own.")
    target.load_state_dict(source.state_dict())
    assert_untouched(target, snapshot(source))


def test_buffers_of_older_language_models_are_reported_and_ignored() -> None:
    old = {
        f"lang_encoder.gpt_neox.layers.{k}.decoder_layer.attention.masked_bias": torch.tensor(-1e9)
        for k in (0, 1)
    }
    model = fresh()
    report = load_open_flamingo(model, trained_state_dict("gpt_neox") | old)
    assert sorted(report.unexpected) == [
        f"lang_encoder.gpt_neox.layers.{k}.attention.masked_bias" for k in (0, 1)
    ]
    assert_computes_what_was_recorded(model, "gpt_neox")


def embedding_key(state_dict: Mapping[str, Tensor]) -> str:
    return next(key for key in state_dict if key.endswith(EMBEDDINGS))


BROKEN = {
    "a missing gate": (lambda sd: {k: v for k, v in sd.items() if k != GATE}, "attn_gate"),
    "a missing perceiver": (
        lambda sd: {k: v for k, v in sd.items() if "perceiver" not in k},
        "perceiver.latents",
    ),
    "fewer latents": (
        lambda sd: sd | {"perceiver.latents": sd["perceiver.latents"][:32]},
        "perceiver.latents",
    ),
    "a deeper perceiver": (
        lambda sd: (
            sd | {k.replace("layers.5", "layers.6"): v for k, v in sd.items() if "perceiver.layers.5" in k}
        ),
        "perceiver.layers.6",
    ),
    "other gates": (lambda sd: sd | {GATE: torch.ones(2)}, "attn_gate"),
    "a float for a gate": (lambda sd: sd | {GATE: 1.0}, "attn_gate"),
    "a short norm": (
        lambda sd: sd | {"lang_encoder.gpt_neox.final_layer_norm.weight": torch.ones(5)},
        "final_layer_norm",
    ),
    "more embeddings": (lambda sd: sd | {embedding_key(sd): torch.zeros(140, 32)}, "embed_in"),
    "wider embeddings": (lambda sd: sd | {embedding_key(sd): torch.zeros(128, 48)}, "embed_in"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_file_that_does_not_fit_is_refused_by_name_with_nothing_loaded(broken: str) -> None:
    breaking, name = BROKEN[broken]
    model = fresh()
    before = snapshot(model)
    with pytest.raises(UserError, match=name) as refusal:
        load_open_flamingo(model, breaking(trained_state_dict("gpt_neox")))
    assert "\n" not in str(refusal.value)
    assert_untouched(model, before)


@pytest.mark.parametrize("other", ["opt", "llama", "mpt", "gptj"])
def test_a_file_of_another_language_model_is_refused(other: str) -> None:
    model = fresh("gpt_neox")
    before = snapshot(model)
    with pytest.raises(UserError, match="another language model"):
        load_open_flamingo(model, trained_state_dict(other))
    assert_untouched(model, before)


@pytest.mark.parametrize("every", [1, 4])
def test_a_file_of_another_interval_is_refused_and_names_the_right_one(every: int) -> None:
    model = fresh(every=every)
    before = snapshot(model)
    with pytest.raises(UserError, match=f"cross_attn_every_n_layers={CHECKPOINT_INTERVAL}"):
        load_open_flamingo(model, trained_state_dict("gpt_neox"))
    assert_untouched(model, before)


class RunsCode:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "the code ran"
    torch.save(trained_state_dict("gpt_neox") | {"code": RunsCode(trace)}, path)
    with pytest.raises(UserError, match="checkpoint.pt"):
        load_open_flamingo(fresh(), path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content", [torch.ones(2), [1, 2], {1: 2}, {}], ids=["tensor", "list", "numbers", "empty"]
)
def test_a_file_of_something_else_is_refused_in_one_line(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="state dict") as refusal:
        load_open_flamingo(fresh(), tmp_path / "checkpoint.pt")
    assert "\n" not in str(refusal.value)


def test_a_truncated_file_and_a_folder_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(trained_state_dict("gpt_neox"), path)
    path.write_bytes(path.read_bytes()[:5000])
    for bad in (path, tmp_path):
        with pytest.raises(UserError, match=bad.name) as refusal:
            load_open_flamingo(fresh(), bad)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [None, b"", b"no tensors here"], ids=["absent", "empty", "text"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="checkpoint.pt") as refusal:
        load_open_flamingo(fresh(), path)
    assert "\n" not in str(refusal.value)
