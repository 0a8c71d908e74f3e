"""Losses that use the output head's matrix are the same, and cheaper, with the trained rows scored apart."""

import copy

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from flamingo_ft.errors import UserError
from flamingo_ft.model.token_rows import RowsApart, with_scores

from .tiny import MEDIA, ids, images, tiny_flamingo, tiny_language_model
from .tiny_language_models import make_tiny

# An output head of its own, one that is the embedding, with a bias, with a softcap, with a scale.
FAMILIES = ["llama", "gpt2", "gptj", "gemma2", "cohere"]
TEXT, PIXELS = ids("aIbIcI", "dIefgh"), images(2, 3)


def trained(lm=None):
    """A Flamingo whose bridge and rows train; the rows are far from those of the language model."""
    model = tiny_flamingo(lm=lm)
    with torch.no_grad():
        for rows in model.token_rows.parameters():
            rows.add_(torch.randn_like(rows))
        bias = model.lang_encoder.get_output_embeddings().bias
        if bias is not None:
            bias.normal_()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("vision_encoder", "lang_encoder")))
    return model


def loss_and_gradients(model, loss) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [7, 60, 1000])
def test_the_logits_and_gradients_of_rows_scored_apart_are_those_of_the_whole_matrix(chunk):
    """In float64, with the vocabulary in chunks, as fused losses process it."""
    torch.manual_seed(0)
    hidden = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(60, 16, dtype=torch.float64)
    rows, ids_ = torch.randn(3, 16, dtype=torch.float64, requires_grad=True), [6, 7, 59]
    weights = torch.randn(5, 60, dtype=torch.float64)
    whole = hidden @ matrix.index_copy(0, torch.tensor(ids_), rows).T
    expected = torch.autograd.grad((whole * weights).sum(), (hidden, rows))
    wide, apart = with_scores(hidden, rows), RowsApart(matrix, ids_)
    logits = torch.cat([wide @ apart[start : start + chunk].T for start in range(0, 60, chunk)], dim=-1)
    torch.testing.assert_close(logits, whole, rtol=1e-13, atol=1e-13)
    for actual, one in zip(
        torch.autograd.grad((logits * weights).sum(), (hidden, rows)), expected, strict=True
    ):
        torch.testing.assert_close(actual, one, rtol=1e-12, atol=1e-12)
    assert torch.equal(wide @ apart.T, wide @ apart[:].T) and apart.shape[1] % 8 == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_trls_fused_loss_and_its_gradients_are_the_models_own(family):
    model = trained(tiny_language_model() if family == "llama" else make_tiny(family))
    batch = {"input_ids": TEXT, "pixel_values": PIXELS, "labels": TEXT.masked_fill(TEXT == MEDIA, -100)}
    loss, expected = loss_and_gradients(model, model(**batch, use_cache=False).loss)
    add_fused_lm_head(model, outputs=("entropy", "mean_logits", "is_top1"))
    actual_loss, actual = loss_and_gradients(model, model(**batch, fused_lm_head=True).loss)
    torch.testing.assert_close(actual_loss, loss, rtol=1e-6, atol=1e-6)
    assert actual.keys() == expected.keys() >= {"token_rows.input.weight"}
    for name in expected:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-4, atol=1e-5 * scale + 1e-7, msg=name
        )


def test_metrics_logged_by_trl_equal_those_of_the_whole_matrix():
    model = trained()
    add_fused_lm_head(model, outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    batch = {"input_ids": TEXT, "pixel_values": PIXELS, "labels": TEXT, "fused_lm_head": True}
    apart = model(**batch)
    whole = model.forward(**batch)  # as models are called that PEFT wraps
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
        torch.testing.assert_close(getattr(apart, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operator makes, the model's own aside."""

    def __init__(self, model):
        super().__init__()
        self.elements = 0
        self._own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._own:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("gradients", [True, False], ids=["training", "reference"])
def test_a_step_makes_no_tensor_of_the_output_heads_size(gradients):
    config = {"vocab_size": 100_000, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    lm = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **config))
    model = trained(lm)
    add_fused_lm_head(model)
    head = lm.get_output_embeddings().weight
    with Largest(model) as largest, torch.set_grad_enabled(gradients):
        loss = model(input_ids=TEXT, pixel_values=PIXELS, labels=TEXT, fused_lm_head=True).loss
        if gradients:
            loss.backward()
    assert head.grad is None and largest.elements < head.numel() / 1.5
    assert not gradients or model.token_rows.output.weight.grad.abs().max() > 0


def test_only_a_fused_loss_sees_other_hidden_states_and_another_matrix():
    model = trained()
    hidden, head = model.backbone(TEXT, PIXELS).last_hidden_state, model.get_output_embeddings()
    assert hidden.shape[-1] == head.weight.shape[-1] == 32 and head.weight.requires_grad
    with model.scoring_rows_apart():
        wide, apart = model.backbone(TEXT, PIXELS).last_hidden_state, model.get_output_embeddings()
        assert copy.deepcopy(model).get_output_embeddings().weight.shape[-1] == 32
    assert wide.shape[-1] == apart.weight.shape[-1] == 40 and not apart.weight.requires_grad
    torch.testing.assert_close(wide @ apart.weight.T, hidden @ head.weight.T)
    assert model.get_output_embeddings().weight.shape[-1] == 32
    model.forward = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(input_ids=TEXT, fused_lm_head=True)
    assert model.get_output_embeddings().weight.shape[-1] == 32


def test_a_trainable_head_gets_its_gradient():
    model = trained()
    head = model.lang_encoder.lm_head.requires_grad_(True)
    add_fused_lm_head(model)
    model(input_ids=TEXT, pixel_values=PIXELS, labels=TEXT, fused_lm_head=True).loss.backward()
    rows = torch.tensor(model.token_rows.token_ids)
    assert head.weight.grad[:50].abs().max() > 0 and not head.weight.grad[rows].any()
    assert model.token_rows.output.weight.grad.abs().max() > 0


def test_activation_offloading_treats_the_matrix_as_a_parameter():
    """It skips instances of Parameter, and asks others for a storage, which this one lacks."""
    apart = RowsApart(torch.zeros(60, 16), [58, 59])
    assert isinstance(apart, torch.nn.Parameter)
    with pytest.raises(RuntimeError):
        apart.untyped_storage().data_ptr()


def test_the_matrix_of_a_quantized_head_is_refused():
    model = trained()
    head = model.lang_encoder.lm_head
    head.weight = torch.nn.Parameter(functional.pad(head.weight, (0, 0)).to(torch.int8), requires_grad=False)
    view = model.get_output_embeddings()
    with pytest.raises(UserError, match="output head: quantized, got a weight of torch.int8"):
        _ = view.weight
