"""Methods that refine a trained model warn of a bridge that is new, and of a high learning rate."""

from __future__ import annotations

import pytest

from flamingo_ft.config import Recipe, load_recipe, method_warnings
from flamingo_ft.config.library import packaged_recipes

NEW_BRIDGE = (
    "train.method {} refines a model that answers already, but the bridge is new (model.init_from is null); "
    "train one with method sft, then set model.init_from to its folder"
)


def recipe(method: str, start: str | None, rate: float | None) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"vision": {"name": "nano"}, "language": {"name": "nano"}, "init_from": start},
            "data": {"train": [{"path": "x.jsonl"}]},
            "train": {"output_dir": "run", "max_steps": 1, "method": method, "learning_rate": rate},
        }
    )


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_a_method_that_refines_a_model_warns_of_a_new_bridge_and_of_a_high_rate(method):
    assert [*method_warnings(recipe(method, None, 1e-4))] == [NEW_BRIDGE.format(method)]
    assert [*method_warnings(recipe(method, "runs/start", None))] == []
    (line,) = method_warnings(recipe(method, "runs/start", 3e-3))
    assert line.startswith(f"train.learning_rate 0.003 is high for train.method {method}")


def test_supervised_training_is_not_warned_of_either():
    assert [*method_warnings(recipe("sft", None, 3e-3))] == []


@pytest.mark.parametrize("path", packaged_recipes().values(), ids=packaged_recipes())
def test_no_packaged_recipe_causes_a_warning(path):
    assert [line for run in load_recipe(path, require=()).runs for line in method_warnings(run)] == []
