"""Tokens added after the model is built, and transformers' other calls for embeddings."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from flamingo_ft import load_language, load_vision
from flamingo_ft.adapters import load_adapter, save_adapter
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, build_flamingo

from .tiny import VOCABULARY, ids, images, tiny_flamingo, tiny_language_model
from .tiny_language_models import make_tiny

INPUTS = ids("aIbc"), images(1, 1)
ADDED = torch.tensor([[10, 58, VOCABULARY, 12, VOCABULARY + 2]])


@pytest.fixture(params=["untied", "tied", "with a bias"])
def model(request):
    family = {"untied": None, "tied": "gpt2", "with a bias": "gptj"}[request.param]
    return tiny_flamingo(lm=make_tiny(family) if family else tiny_language_model())


def test_a_resized_model_keeps_the_logits_of_known_tokens_and_accepts_new_ones(model):
    size = len(model.get_input_embeddings().weight)
    with torch.no_grad():
        before = model(*INPUTS).logits
        embeddings = model.resize_token_embeddings(size + 3)
        after = model(*INPUTS).logits
    assert embeddings is model.get_input_embeddings() and len(embeddings.weight) == size + 3
    assert model.config.get_text_config().vocab_size == size + 3
    torch.testing.assert_close(after[..., :size], before, rtol=1e-6, atol=1e-6)
    new = torch.tensor([[10, 58, size, 12, size + 2]])
    assert torch.isfinite(model(new, INPUTS[1], labels=new).loss)
    torch.testing.assert_close(after[..., size], after[..., size + 2])  # they start alike, at the mean


def test_rows_of_added_tokens_train_with_those_of_the_media_token_and_nothing_else_does(model):
    model.token_rows.requires_grad_(True)
    size = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(size + 3)
    assert model.config.new_token_ids == [*range(58, size + 3)]
    new = torch.tensor([[10, 58, size, 12, size + 2]])
    model(new, INPUTS[1], labels=new).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("token_rows.")}
    index = model.token_rows.token_ids.index(size)
    assert model.token_rows.input.weight.grad[index].abs().max() > 0


def test_the_new_rows_replace_those_of_a_grown_output_head():
    """Growing replaces the head module, and with it the hooks on it."""
    model = tiny_flamingo()
    model.resize_token_embeddings(VOCABULARY + 3)
    with torch.no_grad():
        before = model(*INPUTS).logits
        model.token_rows.output.weight.add_(1.0)
        after = model(*INPUTS).logits
    changed = (after - before).abs().amax((0, 1)) > 0
    assert changed.nonzero().flatten().tolist() == [*range(58, VOCABULARY + 3)]


@torch.no_grad()
def test_rows_apply_after_the_language_model_itself_is_resized():
    model = tiny_flamingo()
    before = model(*INPUTS).logits
    model.lang_encoder.resize_token_embeddings(VOCABULARY + 5)
    torch.testing.assert_close(model(*INPUTS).logits[..., :VOCABULARY], before)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pixel_values": INPUTS[1]}
    model.token_rows.output.weight[1] = 50 * model.backbone(*INPUTS).last_hidden_state[0, -1]
    model.lang_encoder.resize_token_embeddings(VOCABULARY + 6)
    assert int(model.generate(INPUTS[0], **options)[0, 4]) == 59


def test_a_copy_is_resized_alone_and_hooked_once():
    model = tiny_flamingo()
    twin = copy.deepcopy(model)
    twin.resize_token_embeddings(VOCABULARY + 3)
    for one, size in ((model, VOCABULARY), (twin, VOCABULARY + 3)):
        assert one(*INPUTS).logits.shape[-1] == size
        for layer in (one.get_input_embeddings(), one.lang_encoder.lm_head):
            assert [hook.__self__ for hook in layer._forward_hooks.values()] == [one.token_rows]


def test_spare_rows_are_used_and_kept():
    model = tiny_flamingo(lm=make_tiny("gpt2"))
    size = len(model.get_input_embeddings().weight)
    assert size > 62
    before = model(*INPUTS).logits
    model.resize_token_embeddings(62)
    assert len(model.get_input_embeddings().weight) == size and model.token_rows.token_ids == (58, 59, 60, 61)
    torch.testing.assert_close(model(*INPUTS).logits, before)
    model.resize_token_embeddings(62)
    assert model.config.new_token_ids == [58, 59, 60, 61]


def test_a_model_without_token_rows_gets_them_on_resizing():
    model = tiny_flamingo(new_token_ids=[])
    model.resize_token_embeddings(VOCABULARY)
    assert model.token_rows is None
    model.resize_token_embeddings(VOCABULARY + 1)
    assert model.token_rows.token_ids == (VOCABULARY,)
    known = model.get_input_embeddings().weight[:VOCABULARY]
    torch.testing.assert_close(model.token_rows.input.weight[0], known.mean(0))


def test_resizing_without_a_size_changes_nothing_and_padding_adds_no_tokens():
    model = tiny_flamingo()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert len(model.resize_token_embeddings(pad_to_multiple_of=64).weight) == 64
    assert model.config.new_token_ids == [58, 59]
    assert len(model.resize_token_embeddings(65, pad_to_multiple_of=64).weight) == 128
    assert model.token_rows.token_ids == tuple(range(58, 65))


def test_a_resized_model_is_saved_and_loaded(tmp_path):
    model = tiny_flamingo()
    model.resize_token_embeddings(VOCABULARY + 3)
    with torch.no_grad():
        model.token_rows.input.weight.add_(torch.randn_like(model.token_rows.input.weight))
    expected = model(ADDED, INPUTS[1]).logits
    model.save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ADDED, INPUTS[1]).logits, expected)


def test_an_adapter_with_added_tokens_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    sizes = {"num_latents": 2, "depth": 1, "heads": 2, "dim_head": 8}
    model, processor = build_flamingo(load_vision("nano"), load_language("nano"), perceiver=sizes)
    processor.tokenizer.add_tokens(["<left>", "<right>"])
    model.resize_token_embeddings(len(processor.tokenizer))
    with torch.no_grad():
        for rows in model.token_rows.parameters():
            rows.add_(torch.randn_like(rows))
    inputs = processor(text="Is it <left> or <right>?", return_tensors="pt")
    expected = model.eval()(**inputs).logits
    save_adapter(model, processor, tmp_path / "adapter")
    loaded, again = load_adapter(tmp_path / "adapter")
    assert (
        again.tokenizer.convert_tokens_to_ids("<right>")
        == len(processor.tokenizer) - 1
        == inputs["input_ids"].max()
    )
    assert torch.equal(loaded(**inputs).logits, expected)


def test_a_quantized_model_is_resized(tmp_path):
    tiny_flamingo().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    options = {"quantization_config": config, "device_map": "cpu"}
    model = FlamingoForConditionalGeneration.from_pretrained(tmp_path, **options).eval()
    before = model(*INPUTS).logits
    model.resize_token_embeddings(VOCABULARY + 3)
    torch.testing.assert_close(model(*INPUTS).logits[..., :VOCABULARY], before)
    assert torch.isfinite(model(ADDED, INPUTS[1]).logits).all()


@pytest.mark.parametrize("size", [10, VOCABULARY - 1])
def test_tokens_in_use_are_not_dropped(size):
    with pytest.raises(UserError, match=f"got {size} tokens where <image> and others need 60"):
        tiny_flamingo().resize_token_embeddings(size)


def test_rows_that_could_not_be_loaded_again_are_refused_with_advice():
    model = tiny_flamingo(bridge_init={"path": "start", "sha256": "0"})
    with pytest.raises(UserError, match="bridge was started from start.*; merge it"):
        model.resize_token_embeddings(VOCABULARY + 1)
    peft = LoraConfig(target_modules=["q_proj"], modules_to_save=["token_rows.input"])
    wrapped = get_peft_model(tiny_flamingo(), peft)
    with pytest.raises(UserError, match="PEFT has wrapped the rows.*extra_tokens"):
        wrapped.base_model.model.resize_token_embeddings(VOCABULARY + 1)


@torch.no_grad()
def test_embeddings_that_are_set_are_used_with_the_rows_of_new_tokens_in_place():
    model = tiny_flamingo()
    twin = copy.deepcopy(model)
    embedding, head = torch.nn.Embedding(64, 32), torch.nn.Linear(32, 64, bias=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is embedding and model.lang_encoder.lm_head is head
    twin.lang_encoder.model.embed_tokens.weight.copy_(embedding.weight[:VOCABULARY])
    twin.lang_encoder.lm_head.weight.copy_(head.weight[:VOCABULARY])
    torch.testing.assert_close(model(*INPUTS).logits[..., :VOCABULARY], twin(*INPUTS).logits)


def test_invalid_embeddings_are_refused():
    model = tiny_flamingo()
    with pytest.raises(UserError, match="set_output_embeddings: needs a torch module, got OutputHead"):
        model.set_output_embeddings(model.get_output_embeddings())
    with pytest.raises(UserError, match="set_input_embeddings: needs at least 60 rows, got 59"):
        model.set_input_embeddings(torch.nn.Embedding(59, 32))


def test_inputs_embeds_without_input_ids_are_refused():
    model, embeds = tiny_flamingo(), torch.zeros(1, 3, 32)
    for run in (model, model.backbone, model.generate):
        with pytest.raises(UserError, match="no input_ids"):
            run(inputs_embeds=embeds)


def test_the_decoder_is_the_language_models():
    model = tiny_flamingo()
    assert model.get_decoder() is model.lang_encoder.model
