"""A new Flamingo: which tokens are new, how their rows start, and that the language model is unchanged."""

import copy

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from flamingo_ft.backbones.language import LanguageBackbone, load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.errors import UserError
from flamingo_ft.model import build_flamingo
from flamingo_ft.model.added_tokens import (
    EOC_TOKEN,
    MEDIA_TOKEN,
    PAD_TOKEN,
    add_media_tokens,
    grow_vocabulary,
)

KNOWN = len(load_language("nano").tokenizer)
TINY = {"num_latents": 2, "depth": 1, "heads": 2, "dim_head": 8}
SIZES = {"vocab_size": KNOWN, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 24, **options}))


def gpt2(**options):
    return GPT2LMHeadModel(GPT2Config(**{**SIZES, **options}))


def gptj(**options):
    lm = GPTJForCausalLM(GPTJConfig(**{**SIZES, "rotary_dim": 4, **options}))
    torch.nn.init.normal_(lm.lm_head.bias, mean=-2.0)
    return lm


FAMILIES = {"untied": llama, "tied": gpt2, "with a bias in the head": gptj}


@pytest.fixture
def tokenizer():
    return load_language("nano").tokenizer


@pytest.fixture(scope="module")
def vision():
    return load_vision("nano")


def build(vision, tokenizer, make, seed=0, vocab_size=KNOWN, **options):
    """A Flamingo around a random language model, its processor, and a copy of the language model before."""
    torch.manual_seed(seed)
    lm = make(vocab_size=vocab_size).eval()
    plain = copy.deepcopy(lm)
    backbone = LanguageBackbone(lm, tokenizer, {"name": "random", "revision": None, "sha256": ""})
    model, processor = build_flamingo(
        vision, backbone, perceiver=TINY, cross_attention={"heads": 2}, **options
    )
    return model.eval(), processor, plain


def test_only_tokens_missing_from_the_vocabulary_are_new(tokenizer):
    before = tokenizer.get_vocab()
    new = add_media_tokens(tokenizer)
    after = tokenizer.get_vocab()
    assert {token: id for token, id in after.items() if token not in before} == {
        EOC_TOKEN: KNOWN,
        MEDIA_TOKEN: KNOWN + 1,
    }
    assert new == [KNOWN, KNOWN + 1]
    assert {token: after[token] for token in before} == before
    assert add_media_tokens(tokenizer) == [] and tokenizer.get_vocab() == after


def test_a_token_already_in_the_vocabulary_is_not_new(tokenizer):
    tokenizer.add_tokens([MEDIA_TOKEN])
    assert add_media_tokens(tokenizer) == [tokenizer.convert_tokens_to_ids(EOC_TOKEN)] == [KNOWN + 1]
    assert tokenizer("a<image>b")["input_ids"].count(KNOWN) == 1


def test_a_padding_token_is_added_only_to_a_tokenizer_without_one(tokenizer):
    kept = tokenizer.pad_token_id
    add_media_tokens(tokenizer)
    assert tokenizer.pad_token_id == kept and PAD_TOKEN not in tokenizer.get_vocab()
    bare = load_language("nano").tokenizer
    bare.pad_token = None
    assert add_media_tokens(bare) == [KNOWN, KNOWN + 1, KNOWN + 2]
    assert (bare.pad_token, bare.pad_token_id) == (PAD_TOKEN, KNOWN + 2)


def test_existing_special_tokens_stay_special(tokenizer):
    before = set(tokenizer.all_special_tokens)
    add_media_tokens(tokenizer)
    assert set(tokenizer.all_special_tokens) == before | {MEDIA_TOKEN, EOC_TOKEN}
    ids = tokenizer("<image>a<|endofchunk|><|im_start|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_a_grown_vocabulary_keeps_every_row_and_starts_the_added_ones_at_their_mean(make):
    lm = make()
    before = copy.deepcopy(lm.state_dict())
    grow_vocabulary(lm, KNOWN + 3)
    after = lm.state_dict()
    assert before.keys() == after.keys() and lm.config.vocab_size == KNOWN + 3
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor)
    head = lm.get_output_embeddings()
    for rows in (lm.get_input_embeddings().weight, head.weight, *([] if head.bias is None else [head.bias])):
        assert len(rows) == KNOWN + 3
        torch.testing.assert_close(rows[KNOWN:], rows[:KNOWN].mean(0).expand_as(rows[KNOWN:]))


def test_a_language_model_with_spare_rows_is_not_resized(vision, tokenizer):
    model, _, plain = build(vision, tokenizer, llama, vocab_size=KNOWN + 2)
    assert model.lang_encoder.config.vocab_size == KNOWN + 2
    after, before = model.lang_encoder.state_dict(), plain.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("vocab_size", [KNOWN, KNOWN + 64], ids=["no spare rows", "spare rows"])
def test_the_language_model_keeps_its_rows_and_its_logits(vision, tokenizer, make, vocab_size):
    """With closed gates and no new token in the text, the logits of known tokens are unchanged."""
    model, processor, plain = build(vision, tokenizer, make, vocab_size=vocab_size)
    before, after = plain.state_dict(), model.lang_encoder.state_dict()
    assert all(torch.equal(after[name][: len(before[name])], before[name]) for name in before)
    ids = processor(text="Which digit is this?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, actual = plain(ids).logits, model(ids).logits
    assert torch.equal(actual[..., :KNOWN], expected[..., :KNOWN])


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("vocab_size", [KNOWN, KNOWN + 64], ids=["no spare rows", "spare rows"])
def test_new_token_rows_start_at_the_mean_of_the_known_ones(vision, tokenizer, make, vocab_size):
    model, _, plain = build(vision, tokenizer, make, vocab_size=vocab_size)
    assert model.config.new_token_ids == [KNOWN, KNOWN + 1]
    rows = model.token_rows
    for actual, matrix in (
        (rows.input_rows(), plain.get_input_embeddings().weight),
        (rows.output_rows(), plain.get_output_embeddings().weight),
    ):
        torch.testing.assert_close(actual, matrix[:KNOWN].mean(0).expand(2, -1))


def test_the_bridge_starts_with_closed_gates_and_all_is_frozen(vision, tokenizer):
    model, _, _ = build(vision, tokenizer, llama)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for block in model.gated_cross_attn_layers:
        assert block.attn_gate.item() == block.ff_gate.item() == 0


def test_the_configuration_describes_the_built_model(vision, tokenizer):
    options = {"cross_attn_every_n_layers": 2, "media_visibility": "following"}
    model, processor, _ = build(vision, tokenizer, llama, **options)
    config = model.config
    assert (config.cross_attn_every_n_layers, config.media_visibility) == (2, "following")
    assert [block is None for block in model.gated_cross_attn_layers] == [True, False]
    assert config.perceiver == TINY and config.cross_attention == {"heads": 2}
    assert config.media_token_id == processor.image_token_id == KNOWN + 1
    assert config.eoc_token_id == processor.tokenizer.convert_tokens_to_ids(EOC_TOKEN)
    assert config.backbones["vision"] == vision.source
    assert config.backbones["language"]["name"] == "random"
    assert processor.image_processor.open_clip_preprocess == vision.preprocess


def test_a_named_list_of_decoder_layers_passes_through(vision, tokenizer):
    model, _, _ = build(vision, tokenizer, llama, decoder_layers_attr_name="model.layers")
    assert model.decoder_layers_attr_name == model.config.decoder_layers_attr_name == "model.layers"
    with pytest.raises(UserError, match="decoder_layers_attr_name 'model.blocks' does not exist"):
        build(vision, tokenizer, llama, decoder_layers_attr_name="model.blocks")
    blocks = torch.nn.ModuleList([torch.nn.Identity()])
    torch.manual_seed(0)
    lm = llama()
    lm.extra = blocks  # used although it is not the decoder's list
    backbone = LanguageBackbone(lm, tokenizer, {})
    model, _ = build_flamingo(vision, backbone, perceiver=TINY, decoder_layers_attr_name="extra")
    assert len(model.gated_cross_attn_layers) == 1


def test_the_same_seed_builds_the_same_bridge(vision):
    first, second, other = (
        build(vision, load_language("nano").tokenizer, llama, seed=seed)[0].state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["perceiver.latents"], other["perceiver.latents"])
