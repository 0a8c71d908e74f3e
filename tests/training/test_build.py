"""What a recipe builds: the values that a new bridge starts from."""

import pytest

from flamingo_ft.errors import UserError
from flamingo_ft.model.parts import is_gate

from ..regimes import build, recipe


def test_gates_of_a_new_bridge_start_where_the_recipe_says(small_run):
    gates = "model.gate_init={attention: 0.25, feed_forward: 0.125}"
    model, _ = build(gates)
    values = {name: float(p) for name, p in model.named_parameters() if is_gate(name)}
    assert {name.rpartition(".")[2]: value for name, value in values.items()} == {
        "attn_gate": 0.25,
        "ff_gate": 0.125,
    }
    assert all(value == 0 for value in (float(p) for n, p in build()[0].named_parameters() if is_gate(n)))
    with pytest.raises(
        UserError, match=r"model.gate_init: has no effect with init_from, whose gates are kept"
    ):
        recipe(gates, "model.init_from=start")
