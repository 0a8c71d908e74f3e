"""What a recipe builds: the values that a new bridge starts from."""

import pytest

from flamingo_ft.errors import UserError
from flamingo_ft.model.parts import is_gate

from ..regimes import build, recipe


def gates(model) -> dict[str, set[float]]:
    """The values of the gates by kind."""
    values: dict[str, set[float]] = {"attn_gate": set(), "ff_gate": set()}
    for name, parameter in model.named_parameters():
        if is_gate(name):
            values[name.rpartition(".")[2]].add(float(parameter.detach()))
    return values


def test_gates_of_a_new_bridge_start_where_the_recipe_says(small_run):
    setting = "model.gate_init={attention: 0.25, feed_forward: 0.125}"
    assert gates(build(setting)[0]) == {"attn_gate": {0.25}, "ff_gate": {0.125}}
    assert gates(build()[0]) == {"attn_gate": {0.0}, "ff_gate": {0.0}}
    with pytest.raises(
        UserError, match=r"model.gate_init: has no effect with init_from, whose gates are kept"
    ):
        recipe(setting, "model.init_from=start")
