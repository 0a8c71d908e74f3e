"""With its adapter switched off, a model is its base to the bit, and afterwards itself again."""

from itertools import product
from pathlib import Path

import pytest
import torch

from flamingo_ft.adapters import load_adapter, load_base, save_adapter
from flamingo_ft.adapters.switched_off import base_bridge, switched_off
from flamingo_ft.backbones.language import load_language

from ..regimes import LORA, NOTHING_WHOLE, REGIMES, build, logits, quantized, shake
from ..thinned import slow_except

FORMS = slow_except(["none", "nf4"], ["none", "nf4", "int8"])
CONTINUED = "model.init_from=start"
BASED = {
    "LoRA on a frozen bridge": REGIMES["LoRA only"],
    "LoRA on every part": REGIMES["LoRA everywhere"],
    "the whole bridge, continued": (CONTINUED,),
    "one part of the bridge, continued": (CONTINUED, "trainable={perceiver: false, new_tokens: false}"),
    "LoRA and a bridge, continued": (CONTINUED, LORA),
}


def quantize(form: str, regime: str = "") -> tuple[str, ...]:
    return () if form == "none" else quantized(form, regime)


def trained(*overrides: str):
    """Return the model and processor of an adapter whose every trained tensor moved, and its base bridge."""
    model, processor = build(*overrides)
    shake(model, 0.3)
    save_adapter(model, processor, Path("adapter"))
    model, processor = load_adapter("adapter")
    return model, processor, base_bridge(Path("adapter"), model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("regime", ["bridge", "bridge and LoRA"])
def test_without_a_bridge_from_scratch_the_model_is_as_before_training(small_run, regime, form):
    overrides = (*REGIMES[regime], *quantize(form))
    untrained = logits(*build(*overrides))
    model, processor, bridge = trained(*overrides)
    with_adapter = logits(model, processor)
    assert not torch.equal(with_adapter, untrained)
    with switched_off(model, bridge):
        assert torch.equal(logits(model, processor), untrained)
    assert torch.equal(logits(model, processor), with_adapter)


@torch.no_grad()
def test_without_a_bridge_from_scratch_text_is_read_by_the_language_model_alone(small_run):
    model, processor, bridge = trained(LORA)
    ids = processor.tokenizer("Which digit is this?", return_tensors="pt")["input_ids"]
    alone = load_language("nano")
    known = len(alone.tokenizer)
    expected = alone.model(ids).logits
    with switched_off(model, bridge):
        assert torch.equal(model(input_ids=ids).logits[..., :known], expected[..., :known])
    assert not torch.equal(model(input_ids=ids).logits[..., :known], expected[..., :known])


PLAIN_CASES = [
    *((case, "none") for case in BASED),
    ("LoRA on every part", "nf4"),
    ("the whole bridge, continued", "nf4"),
]


@pytest.mark.parametrize(
    "case, form",
    [
        pytest.param(*case, marks=() if case in PLAIN_CASES else pytest.mark.slow)
        for case in product(BASED, ["none", "nf4", "int8"])
    ],
)
def test_without_an_adapter_on_a_bridge_the_model_is_its_base(small_run, case, form):
    regime = "LoRA" if "continued" not in case else ""  # only a frozen bridge can be quantized
    model, processor, bridge = trained(*BASED[case], *quantize(form, regime))
    base = logits(load_base("adapter"), processor)
    with_adapter = logits(model, processor)
    assert not torch.equal(with_adapter, base)
    with switched_off(model, bridge):
        assert torch.equal(logits(model, processor), base)
    assert torch.equal(logits(model, processor), with_adapter)


def test_the_base_of_a_continued_bridge_is_the_adapter_that_it_started_from(small_run):
    model, processor, bridge = trained(CONTINUED)
    with switched_off(model, bridge):
        assert torch.equal(logits(model, processor), logits(*load_adapter("start")))


def test_lora_on_a_frozen_bridge_replaces_nothing_in_it(small_run):
    _, _, bridge = trained(NOTHING_WHOLE, LORA, CONTINUED)
    assert bridge == {}


@pytest.mark.parametrize("overrides", [(LORA,), (CONTINUED, LORA)])
def test_after_an_error_the_adapter_is_on_again(small_run, overrides):
    model, processor, bridge = trained(*overrides)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with_adapter = logits(model, processor)
    with pytest.raises(ZeroDivisionError), switched_off(model, bridge):
        assert not torch.equal(logits(model, processor), with_adapter)
        raise ZeroDivisionError
    assert torch.equal(logits(model, processor), with_adapter)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_can_be_switched_off_again_and_again(small_run):
    model, processor, bridge = trained(LORA)
    answers = []
    for _ in range(2):
        with switched_off(model, bridge):
            answers.append(logits(model, processor))
    assert torch.equal(*answers)
