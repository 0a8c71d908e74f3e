"""Finding the decoder layers of language models, and the shape of what flows through them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    OPTConfig,
    OPTForCausalLM,
)

from flamingo_ft.backbones.decoder_layers import (
    DECODER_LAYERS,
    NO_CONTEXT_LIMIT,
    UNSUPPORTED,
    ResidualStreams,
    context_length,
    find_decoder_layers,
    hidden_size,
    residual_streams,
)
from flamingo_ft.errors import UserError
from tests.model.tiny_language_models import LAYERS, make_tiny


def llama(layers: int = 3) -> LlamaForCausalLM:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes))


def opt_with_narrow_embeddings() -> OPTForCausalLM:
    """Return a model like OPT-350m, whose embeddings are narrower than its layers."""
    sizes = {"vocab_size": 32, "ffn_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(hidden_size=16, word_embed_proj_dim=8, **sizes))


def refusal(lm: nn.Module, override: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        find_decoder_layers(lm, override)
    message = str(caught.value)
    assert "\n" not in message
    assert "decoder_layers_attr_name" in message
    return message


def layer_inputs(lm: nn.Module) -> list[tuple[int, Tensor]]:
    """Return index and first argument of each call of a decoder layer in one forward."""
    calls: list[tuple[int, Tensor]] = []
    for index, layer in enumerate(find_decoder_layers(lm)[1]):
        layer.register_forward_pre_hook(lambda module, args, index=index: calls.append((index, args[0])))
    lm(input_ids=torch.arange(3, 9)[None], use_cache=False)
    return calls


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("llama", "model.layers"),
        ("gpt2", "transformer.h"),
        ("mpt", "transformer.blocks"),
        ("gpt_neox", "gpt_neox.layers"),
        ("opt", "model.decoder.layers"),
        ("bart", "model.decoder.layers"),
        ("mamba", "backbone.layers"),
        *DECODER_LAYERS.items(),
    ],
)
def test_layers_are_found_by_structure_or_by_table(family, path):
    lm = make_tiny(family)
    actual, layers = find_decoder_layers(lm)
    assert actual == path
    assert layers is lm.get_submodule(path)


@pytest.mark.parametrize(
    "family", ["gemma3", "git", "got_ocr2", "phi4_multimodal", "moss_transcribe_diarize"]
)
def test_the_layers_of_a_tower_are_not_taken_for_decoder_layers(family):
    lm = make_tiny(family)
    towers = [p for p, m in lm.named_modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS]
    assert len(towers) > 1, "the test needs a tower as deep as the text model"
    path, _ = find_decoder_layers(lm)
    assert not any(part in path for part in ("vision", "image", "audio"))


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral", "jamba", "zamba", "gemma3n_text", "whisper"])
def test_the_layers_found_run_once_each_and_in_order(family):
    lm = make_tiny(family)
    _, layers = find_decoder_layers(lm)
    assert [index for index, _ in layer_inputs(lm)] == list(range(len(layers)))


def test_lists_inside_layers_are_not_candidates():
    lm = llama(layers=3)
    for layer in lm.model.layers:
        layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert find_decoder_layers(lm)[0] == "model.layers"


def test_two_candidate_lists_are_an_error_that_names_both():
    lm = llama(layers=3)
    lm.model.norms = nn.ModuleList(nn.LayerNorm(2) for _ in range(3))
    message = refusal(lm)
    assert "'model.layers'" in message and "'model.norms'" in message
    assert find_decoder_layers(lm, "model.layers")[1] is lm.model.layers


def test_a_model_without_layers_is_an_error_that_shows_its_lists():
    lm = llama(layers=3)
    lm.model.layers = nn.ModuleList(lm.model.layers[:2])
    assert "'model.layers' (2 entries)" in refusal(lm)
    lm.model.layers = nn.Sequential()
    assert "it has no ModuleList, so choose another language model" in refusal(lm)


def test_an_override_takes_precedence():
    lm = llama(layers=3)
    lm.model.some = nn.ModuleList([nn.Linear(2, 2)])
    path, layers = find_decoder_layers(lm, "model.some")
    assert (path, layers) == ("model.some", lm.model.some)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.layer", "does not exist in LlamaForCausalLM"),
        ("model.embed_tokens.weight", "does not exist in LlamaForCausalLM"),
        ("model.norm", "is a LlamaRMSNorm in LlamaForCausalLM, not a list of layers"),
        ("", "is a LlamaForCausalLM in LlamaForCausalLM, not a list of layers"),
    ],
)
def test_a_wrong_override_is_an_error_that_shows_the_right_one(override, problem):
    message = refusal(llama(), override)
    assert problem in message
    assert "'model.layers' (3 entries)" in message


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_an_unsupported_family_is_refused_with_its_reason(model_type):
    lm = nn.Module()
    lm.config = SimpleNamespace(model_type=model_type)
    assert UNSUPPORTED[model_type] in refusal(lm)


@pytest.mark.parametrize(
    "lm",
    [
        opt_with_narrow_embeddings,
        lambda: make_tiny("mpt"),
        lambda: make_tiny("rembert"),
        lambda: make_tiny("blt"),
        lambda: make_tiny("gemma3n_text"),
        lambda: make_tiny("deepseek_v4"),
        lambda: make_tiny("qwen4_exp_text"),
    ],
    ids=["opt", "mpt", "rembert", "blt", "gemma3n", "deepseek_v4", "qwen4_exp"],
)
def test_hidden_size_is_the_width_of_one_stream_between_layers(lm):
    lm = lm()
    _, hidden = layer_inputs(lm)[0]
    streams = residual_streams(lm.config)
    hidden = hidden if streams is None else streams.mean(hidden)
    assert hidden.shape == (1, 6, hidden_size(lm.config))


@pytest.mark.parametrize(
    ("layout", "shape"), [("outer", (4, 2, 5, 3)), ("inner", (2, 5, 4, 3)), ("flat", (2, 5, 12))]
)
def test_an_update_reaches_every_residual_stream_alike(layout, shape):
    streams, hidden, update = ResidualStreams(layout, 4), torch.randn(shape), torch.randn(2, 5, 3)
    added = streams.add(hidden, update)
    torch.testing.assert_close(streams.mean(added), streams.mean(hidden) + update)
    change = streams.add(torch.zeros(shape), update)
    by_stream = {
        "outer": lambda x: x,
        "inner": lambda x: x.movedim(2, 0),
        "flat": lambda x: x.unflatten(-1, (4, 3)).movedim(2, 0),
    }[layout](change)
    for stream in by_stream:
        assert torch.equal(stream, update)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (OPTConfig(max_position_embeddings=64), 64),
        (MptConfig(max_seq_len=32), 32),
        (GPT2Config(n_positions=16), 16),
        (BloomConfig(), NO_CONTEXT_LIMIT),
    ],
)
def test_the_context_length_is_read_from_the_configuration(config, length):
    assert context_length(config) == length
