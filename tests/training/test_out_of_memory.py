"""Running out of memory is a one-line error with the run's memory plan, and exit code 2."""

import weakref

import pytest
import torch

from flamingo_ft import cli
from flamingo_ft.errors import OutOfMemory
from flamingo_ft.training import interruptions
from flamingo_ft.training.train import train
from flamingo_ft.training.trainer import FlamingoTrainerMixin

from .test_train import folder, recipe  # noqa: F401  (a fixture)

GPU_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. "
    "GPU 0 has a total capacity of 14.56 GiB of which 1.2 GiB is free."
)


def gpu_is_full(*_, **__):
    raise torch.OutOfMemoryError(GPU_MESSAGE)


def host_is_full(*_, **__):
    return torch.empty(1 << 50)  # torch's own allocator fails


def python_is_full(*_, **__):
    return bytearray(1 << 60)


@pytest.mark.parametrize(
    ("fails", "device", "detail"),
    [
        (gpu_is_full, "GPU", " (tried to allocate 2.50 GiB more)"),
        (host_is_full, "host", " (tried to allocate 4503599627370496 bytes more)"),
        (python_is_full, "host", ""),
    ],
)
def test_a_step_that_does_not_fit_is_a_one_line_error(fails, device, detail):
    with pytest.raises(OutOfMemory) as error, interruptions.oom_as_user_error("training"):
        fails()
    assert str(error.value).startswith(
        f"training: {device} memory is full{detail}; lower train.batch_size or follow"
    )


def test_the_command_prints_the_error_and_the_memory_plan(folder, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(FlamingoTrainerMixin, "training_step", host_is_full)
    assert cli.main(["train", "./recipe.yaml", "data.eval=[]"]) == 2
    error = capsys.readouterr().err
    assert "error: training: host memory is full" in error and "Traceback" not in error
    assert "memory of a training step on a GPU, GiB" in error and "language model" in error


@pytest.mark.parametrize(
    "place",
    ["flamingo_ft.training.trainer.run_evaluation", "flamingo_ft.inference.predictor.Predictor.answer"],
)
def test_an_evaluation_that_does_not_fit_has_its_own_remedy(folder, monkeypatch, place):  # noqa: F811
    monkeypatch.setattr(place, gpu_is_full)
    monkeypatch.setattr(interruptions, "make_plan_report", lambda recipe: _Report())
    with pytest.raises(OutOfMemory, match="evaluation: GPU memory is full.*lower eval.batch_size"):
        train(recipe("eval.steps=1", f"eval.before={str('run_evaluation' not in place).lower()}"))


def test_a_backbone_that_does_not_fit_is_not_reported_as_damaged(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", gpu_is_full)
    monkeypatch.setattr(interruptions, "make_plan_report", lambda recipe: _Report())
    with pytest.raises(OutOfMemory, match="loading: GPU memory is full.*quantize the backbones"):
        train(recipe())


def test_tensors_are_freed_before_the_plan_is_made(folder, monkeypatch):  # noqa: F811
    references = []

    def step(self, model, *_, **__):
        tensor = torch.ones(10)
        references.extend(map(weakref.ref, (tensor, model)))
        return host_is_full()

    monkeypatch.setattr(FlamingoTrainerMixin, "training_step", step)
    monkeypatch.setattr(
        interruptions, "make_plan_report", lambda recipe: _Report([ref() is None for ref in references])
    )
    with pytest.raises(OutOfMemory) as error:
        train(recipe("data.eval=[]"))
    assert error.value.plan == [True, True]


def test_the_error_is_printed_without_a_plan_if_that_does_not_fit_either(folder, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(FlamingoTrainerMixin, "training_step", gpu_is_full)
    monkeypatch.setattr(interruptions, "make_plan_report", host_is_full)
    assert cli.main(["train", "./recipe.yaml", "data.eval=[]"]) == 2
    assert "error: training: GPU memory is full" in capsys.readouterr().err


def test_other_errors_are_not_converted(folder, monkeypatch):  # noqa: F811
    def step(*_, **__):
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    monkeypatch.setattr(FlamingoTrainerMixin, "training_step", step)
    with pytest.raises(RuntimeError, match="same dtype"):
        train(recipe("data.eval=[]"))


class _Report:
    def __init__(self, value=None):
        self.value = value

    def record(self):
        return self.value
