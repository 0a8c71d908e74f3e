"""Precision: autocast by machine, float32 trainable parameters, loss scaling that overflows."""

import pytest
import torch

from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.backbones import precision
from flamingo_ft.backbones.precision import autocast_dtype, inference_dtype
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.data import open_data
from flamingo_ft.errors import UserError
from flamingo_ft.plan.precision import autocast_dtype as planned_autocast_dtype
from flamingo_ft.progress import progress_bars
from flamingo_ft.training.evaluation import Evaluator
from flamingo_ft.training.preflight import check_precision
from flamingo_ft.training.train import train

from ..regimes import AUTO, LORA, build, quantized, recipe, trainer

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(params=["CPU", "CPU with bf16", "T4", "A100"])
def machine(request, monkeypatch):
    """Pretend to have this GPU, or this CPU and no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "CPU" not in request.param)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: request.param == "CPU with bf16")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: request.param == "A100"
    )
    return request.param


def test_auto_precision_follows_the_machine(machine):
    half = {"CPU": None, "CPU with bf16": BF16, "T4": FP16, "A100": BF16}[machine]
    assert autocast_dtype("auto") == half
    assert Quantization("nf4").dtype == (half or torch.float32)
    assert [autocast_dtype(word) for word in ("fp32", "bf16", "fp16")] == [None, BF16, FP16]


def test_answers_are_computed_in_bf16_where_it_is_fast_and_in_float32_on_other_cpus(machine):
    expected = {"CPU": torch.float32, "CPU with bf16": BF16, "T4": None, "A100": BF16}
    assert inference_dtype("auto") == expected[machine]
    assert [inference_dtype(word) for word in ("fp32", "bf16", "fp16")] == [torch.float32, BF16, FP16]
    with pytest.raises(UserError, match="dtype: must be one of auto, fp32, bf16, fp16, got half"):
        inference_dtype("half")


@pytest.mark.parametrize("machine", ["CPU", "CPU with bf16"], indirect=True)
def test_the_plan_for_a_cpu_computes_as_it_trains(machine):
    assert planned_autocast_dtype("auto", "cpu") == autocast_dtype("auto")
    assert planned_autocast_dtype("auto", "cuda") == BF16


@pytest.mark.parametrize("form", [None, "nf4"])
@pytest.mark.parametrize("machine", ["CPU with bf16"], indirect=True)
def test_frozen_backbones_are_kept_in_bf16_unless_it_is_switched_off(small_run, machine, form):
    overrides = (*AUTO, LORA, *(quantized(form) if form else ()))
    for word, expected in (("auto", BF16), ("fp32", torch.float32)):
        if form and word == "fp32":
            overrides += ("model.vision.compute_dtype=fp32", "model.language.compute_dtype=fp32")
        model, _ = build(*overrides, f"train.precision={word}")
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.float32, name
            elif parameter.is_floating_point():  # not the bytes of 4-bit matrices
                assert parameter.dtype == expected, name


@pytest.mark.parametrize("machine", ["CPU with bf16"], indirect=True)
def test_losses_in_bf16_stay_close_to_those_in_float32(small_run, machine):
    course = ("model.init_from=start", LORA, "train.max_steps=8", "train.learning_rate=1.0e-3")
    curves = {}
    for word in ("auto", "fp32"):
        one = trainer(*build(*course, f"train.precision={word}"), *course, f"train.precision={word}")
        one.train()
        curves[word] = losses(one)
    assert curves["auto"] != curves["fp32"]
    assert curves["auto"] == pytest.approx(curves["fp32"], rel=0.03)
    assert curves["auto"][-1] < 0.9 * curves["auto"][0]


@pytest.mark.parametrize("machine", ["CPU with bf16"], indirect=True)
def test_held_out_questions_are_answered_under_autocast(small_run, machine):
    """So that the trainable float32 weights are multiplied in bf16 there too."""
    model, processor = build("train.precision=auto")
    samples = [next(iter(open_data(recipe().data, 0).samples(open_data(recipe().data, 0).train)))]
    dtypes = set()
    layer = model.gated_cross_attn_layers[0].ff[1]
    layer.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    with progress_bars(disable=True) as progress:
        Evaluator(model, processor, samples, recipe("train.precision=auto"), progress).scores()
    assert dtypes == {BF16}


def test_auto_is_the_same_for_autocast_and_quantized_matrices(small_run, machine):
    check_precision(recipe(*AUTO, *quantized("nf4")))


@pytest.mark.parametrize("machine", ["A100"], indirect=True)
def test_mixing_float16_and_bfloat16_is_refused(small_run, machine):
    settings = (*AUTO, "train.precision=fp16", *quantized("nf4"))
    with pytest.raises(
        UserError, match=r"model.vision.compute_dtype: auto is bfloat16 here.*use fp16 for both"
    ):
        check_precision(recipe(*settings))
    same = ("model.vision.compute_dtype=fp16", "model.language.compute_dtype=fp16")
    check_precision(recipe(*settings, *same))


@pytest.mark.parametrize("machine", ["T4"], indirect=True)
@pytest.mark.parametrize("setting", ["trainable.dtype=bf16", "train.optimizer_in_backward=true"])
def test_float16_chosen_by_auto_has_the_same_restrictions_as_fp16(small_run, machine, setting):
    with pytest.raises(UserError, match=setting.partition("=")[0] + ": .*auto is float16 on this GPU"):
        check_precision(recipe("train.precision=auto", setting))


def test_float16_without_a_gpu_is_refused_before_loading(small_run, monkeypatch):
    monkeypatch.setattr("flamingo_ft.training.train.open_data", None)
    with pytest.raises(
        UserError,
        match="train.precision: got fp16, which needs a GPU, but no GPU is available; use fp32, bf16 or auto",
    ):
        train(recipe("train.precision=fp16"))


def float16_trainer(monkeypatch, *overrides, scale=2.0**10):
    """Return a trainer that computes in float16 on the CPU, with loss scaling."""
    monkeypatch.setattr("flamingo_ft.training.build.autocast_dtype", lambda precision: FP16)
    fp16_trainer = trainer(*build("model.init_from=start", LORA), "model.init_from=start", LORA, *overrides)
    fp16_trainer.accelerator.native_amp = True
    fp16_trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return fp16_trainer


def losses(fp16_trainer) -> list[float]:
    return [entry["loss"] for entry in fp16_trainer.state.log_history if "loss" in entry]


def test_float16_learns_with_trainable_parameters_in_float32(small_run, monkeypatch):
    fp16_trainer = float16_trainer(monkeypatch, "train.max_steps=6")
    dtypes = set()
    layer = fp16_trainer.model.gated_cross_attn_layers[0].ff[1]
    layer.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    fp16_trainer.train()
    assert dtypes == {FP16}
    assert losses(fp16_trainer)[-1] < 0.8 * losses(fp16_trainer)[0]
    assert fp16_trainer.accelerator.scaler.get_scale() == 2.0**10
    for name, parameter in trainable_parameters(fp16_trainer.model).items():
        assert parameter.dtype == torch.float32 and parameter.isfinite().all(), name
        assert all(
            value.dtype == torch.float32 for value in fp16_trainer.optimizer.state[parameter].values()
        ), name


def test_a_gradient_overflow_does_not_advance_the_schedule(small_run, monkeypatch):
    """Each overflow halves the scale and skips the step; the learning rate stays where it was."""
    course = ("train.max_steps=3", "train.warmup_steps=4", "train.lr_scheduler=constant")
    fp16_trainer = float16_trainer(monkeypatch, *course, scale=2.0**40)
    before = {
        name: parameter.detach().clone()
        for name, parameter in trainable_parameters(fp16_trainer.model).items()
    }
    fp16_trainer.train()
    assert all(
        torch.equal(parameter, before[name])
        for name, parameter in trainable_parameters(fp16_trainer.model).items()
    )
    assert fp16_trainer.accelerator.scaler.get_scale() == 2.0**37
    assert [entry["learning_rate"] for entry in fp16_trainer.state.log_history if "loss" in entry] == [
        0.0
    ] * 3
