"""NaN or Inf in a loss or gradient: the run stops or skips the step, and names the cause."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.errors import UserError
from flamingo_ft.training.train import train

from ..regimes import build, recipe, trainer

SKIP = "train.non_finite=skip_step"
START = "model.init_from=start"
BLOCK = "gated_cross_attn_layers.0.ff.1"


def build_trainer(*overrides):
    return trainer(*build(START, *overrides), START, "train.batch_size=1", *overrides)


def spoil_output(trainer, module, steps, value=math.nan):
    """Multiply a module's output by ``value`` in all forward passes of ``steps``, counted from 0."""

    def spoil(_, __, output):
        return output * value if trainer.state.global_step in steps else output

    trainer.model.get_submodule(module).register_forward_hook(spoil)


def spoil_gradient(trainer, module, steps):
    layer = trainer.model.get_submodule(module)

    def spoil(gradient):
        return gradient * math.inf if trainer.state.global_step in steps else gradient

    layer.weight.register_hook(spoil)


def state(trainer):
    parameters = trainable_parameters(trainer.model)
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return values, {name: copy.deepcopy(trainer.optimizer.state[p]) for name, p in parameters.items()}


@pytest.mark.parametrize("inside", ["false", "true"])
def test_a_non_finite_loss_stops_before_the_step_and_names_step_samples_and_module(small_run, inside):
    bad = build_trainer("train.max_steps=4", f"train.optimizer_in_backward={inside}")
    spoil_output(bad, BLOCK, {2})
    states = []
    bad.add_callback(_AtStepEnd(lambda: states.append(state(bad))))
    message = (
        r"training: loss is nan at step 3; trained on .*train.jsonl: row [01]: "
        rf"the first output that is not finite is that of {re.escape(BLOCK)}; lower train.learning_rate"
    )
    with pytest.raises(UserError, match=message) as error:
        bad.train()
    assert ("skip_step" in str(error.value)) == (inside == "false")
    assert len(states) == 2 and _same(states[-1], state(bad))


@pytest.mark.parametrize("inside", ["false", "true"])
def test_a_non_finite_gradient_names_its_parameter(small_run, inside):
    bad = build_trainer("train.max_steps=4", f"train.optimizer_in_backward={inside}")
    spoil_gradient(bad, BLOCK, {1})
    cause = (
        f"that of {BLOCK}, whose weight is not finite"
        if inside == "true"
        else f"first gradient that is not is that of {BLOCK}.weight"
    )
    with pytest.raises(UserError, match=rf"gradient norm is (nan|inf) at step 2; .*{re.escape(cause)}"):
        bad.train()


def test_the_bad_one_of_accumulated_batches_is_named(small_run):
    bad = build_trainer(
        "train.max_steps=2", "train.gradient_accumulation_steps=4", "train.lr_scheduler=constant"
    )
    calls = []

    def spoil(_, __, output):
        calls.append(0)
        return output * math.nan if len(calls) % 4 == 3 else output

    bad.model.get_submodule(BLOCK).register_forward_hook(spoil)
    with pytest.raises(UserError, match=r"step 1; trained on [^,]*: row [01]: the first output") as error:
        bad.train()
    third = bad.non_finite_guard._batches[2][1].rows[0]
    assert f"trained on {third}:" in str(error.value)


@pytest.mark.parametrize("spoil", [spoil_output, spoil_gradient])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_skipped_step_changes_neither_parameters_nor_optimizer_state(small_run, spoil, optimizer, capsys):
    bad = build_trainer("train.max_steps=4", SKIP, f"train.optimizer={optimizer}")
    spoil(bad, BLOCK, {2})
    states = []
    bad.add_callback(_AtStepEnd(lambda: states.append(state(bad))))
    bad.train()
    assert _same(states[1], states[2]) and not _same(states[2], states[3])
    assert "step 3 skipped" in capsys.readouterr().err
    losses = [entry["loss"] for entry in bad.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    assert [entry["skipped_steps"] for entry in bad.state.log_history if "skipped_steps" in entry] == [1]


def test_ten_bad_steps_in_a_row_end_the_run_and_nine_do_not(small_run):
    bad = build_trainer("train.max_steps=40", SKIP)
    spoil_output(bad, BLOCK, {*range(1, 10), *range(11, 21)})
    with pytest.raises(UserError, match="at step 21 for the 10th time in a row"):
        bad.train()


def test_a_finite_run_is_the_same_under_both_policies(small_run):
    runs = [build_trainer("train.max_steps=3", setting) for setting in (SKIP, "train.non_finite=stop")]
    for run in runs:
        run.train()
    assert _same(*map(state, runs))


@pytest.mark.slow
def test_skipped_steps_are_in_the_metrics_and_a_diverged_run_stops_in_one_line(small_run, monkeypatch):
    diverging = ("train.learning_rate=1.0e+30", "train.max_grad_norm=1.0e+30", "train.lr_scheduler=constant")
    with pytest.raises(UserError, match=r"at step \d+; trained on .*lower train.learning_rate"):
        train(recipe(*diverging, "train.max_steps=20"))
    metrics = train(recipe(*diverging, "train.max_steps=3", SKIP, "train.output_dir=skipped"))
    assert metrics["train"]["skipped_steps"] >= 1
    assert json.loads(Path("skipped/metrics.json").read_text())["train"] == metrics["train"]


class _AtStepEnd(TrainerCallback):
    """Calls back after each step."""

    def __init__(self, do):
        self.do = do

    def on_step_end(self, args, state, control, **_):
        self.do()


def _same(one, other) -> bool:
    """Whether parameters and optimizer states are equal bit by bit."""
    (values, states), (others, other_states) = one, other
    return all(torch.equal(values[name], others[name]) for name in values) and all(
        torch.equal(torch.as_tensor(states[name][key]), torch.as_tensor(other_states[name][key]))
        for name in states
        for key in states[name]
    )
