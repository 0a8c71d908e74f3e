"""A dialogue kept in a cache is answered as the whole text would be, reading each token once."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MistralConfig, MistralForCausalLM

from flamingo_ft import Predictor
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.data.sample import text_message
from flamingo_ft.errors import UserError
from flamingo_ft.inference.conversation import Conversation
from flamingo_ft.inference.prompts import Prompt
from flamingo_ft.model import build_flamingo
from flamingo_ft.model.language_model_inputs import CANNOT_CONTINUE_CACHE
from tests.data.dialogues import IMAGE, assistant, user
from tests.model.tiny_language_models import FAMILIES, make_tiny
from tests.thinned import slow

LENGTH = 6  # tokens of an answer


def sliding_window(vocab_size):
    config = MistralConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, sliding_window=16, max_position_embeddings=512,
    )  # fmt: skip
    return MistralForCausalLM(config)


def make_predictor(make_language_model):
    """Return a predictor with a random bridge, of the nano language model or another with its tokenizer."""
    torch.manual_seed(0)
    language = load_language("nano")
    if make_language_model is not None:
        language = replace(language, model=make_language_model(language.model.config.vocab_size))
    small = {"heads": 2, "dim_head": 8}
    model, processor = build_flamingo(
        load_vision("nano"),
        language,
        perceiver={"num_latents": 2, "depth": 1, **small},
        cross_attention=small,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("perceiver.", "gated_cross_attn_layers.")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return Predictor(model.eval(), processor, max_new_tokens=LENGTH, image_cache_mib=1)


@pytest.fixture(scope="module", params=[None, sliding_window], ids=["whole cache", "sliding window"])
def predictor(request):
    return make_predictor(request.param)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(folder / f"{index}.png")
    return [str(folder / f"{index}.png") for index in range(3)]


@pytest.fixture
def tokens_read(predictor):
    """Numbers of tokens that the language model reads at once."""
    counts = []
    hook = predictor.model.lang_encoder.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: counts.append(args[0].shape[1])
    )
    yield counts
    hook.remove()


def answer_to(predictor, messages, images):
    return predictor.answer([Prompt(messages, images)])[0]


def test_every_turn_is_answered_as_the_whole_dialogue_would_be(predictor, files):
    conversation = Conversation(predictor, system="Answer briefly.")
    messages, images = [text_message("system", "Answer briefly.")], []
    for text, new in (
        ("Hello there.", []),
        ("Which?", files[:1]),
        ("And now?", []),
        ("And these?", files[1:]),
    ):
        asked, shown = [*messages, user(*[IMAGE] * len(new), text)], [*images, *new]
        answer = conversation.ask(text, new)
        assert answer == answer_to(predictor, asked, shown)
        if answer:
            messages, images = [*asked, assistant(answer)], shown
    assert conversation.messages == messages and conversation.images == images and conversation.turns > 2


# Those that cannot continue from a cache, and one of every other kind of cache; of all others, a quarter.
KINDS = [*CANNOT_CONTINUE_CACHE, "gemma3_text", "gpt2", "jamba", "qwen3_next", "rwkv"]
OTHERS = [slow(family) for family in FAMILIES if family not in KINDS][::4]


@pytest.mark.parametrize("family", [*KINDS, *OTHERS])
def test_a_language_model_continues_from_its_cache_or_reads_the_dialogue_again(family):
    """The next turn's text begins with what was read, or parts from it within the answer."""
    if family == "xlstm":
        pytest.skip("transformers cannot add rows to its embedding")
    predictor = make_predictor(lambda vocab_size: make_tiny(family, vocab_size=vocab_size))
    logits = []

    def always_answer(token, module, args, output):
        logits.append(output.logits[:, -1].clone())
        output.logits[..., token] = torch.finfo(torch.float32).max

    for word in ("lamps", " lamps"):  # of the second, an answer has the space only after its first token
        token = predictor.processor.tokenizer(word, add_special_tokens=False)["input_ids"][-1]
        hook = predictor.model.lang_encoder.register_forward_hook(partial(always_answer, token))
        conversation = Conversation(predictor, max_new_tokens=3)
        conversation.ask("Hello there.")
        dialogue = [*conversation.messages, user("And now?")]
        assert len(dialogue) == 3
        logits.clear()
        conversation.ask("And now?")
        continued = logits[0]
        logits.clear()
        answer_to(predictor, dialogue, [])
        hook.remove()
        tolerance = 1e-4 * float(logits[0].abs().max())
        torch.testing.assert_close(continued, logits[0], rtol=0, atol=tolerance)


def test_a_turn_reads_only_the_tokens_that_are_new(predictor, files, tokens_read):
    conversation = Conversation(predictor)
    conversation.ask("Which digit is this?", files[0])
    first, answered = tokens_read[0], len(tokens_read)
    conversation.ask("And now?")
    whole = len(predictor.encode([Prompt(conversation.messages[:-1], conversation.images)])[0])
    assert tokens_read[1:answered] == [1] * (answered - 1)
    # A sliding window that has dropped tokens cannot go back to where the texts part.
    window = getattr(predictor.model.lang_encoder.config, "sliding_window", None)
    assert tokens_read[answered] <= (whole if window else whole - first)


def test_an_undone_question_leaves_no_trace(predictor, files):
    conversation = Conversation(predictor)
    conversation.ask("Which?", files[0])
    before = conversation.row()
    conversation.ask("And this?", files[1:])
    assert conversation.undo() and conversation.row() == before
    expected = answer_to(
        predictor, [*before["messages"], user(IMAGE, "Or this one?")], [*before["images"], files[2]]
    )
    assert conversation.ask("Or this one?", files[2]) == expected
    assert conversation.undo() and conversation.undo() and not conversation.undo()
    assert conversation.row() == {"messages": [], "images": []}


def test_a_dialogue_begins_anew_after_a_reset(predictor, files):
    conversation = Conversation(predictor, system="Answer briefly.")
    first = conversation.ask("Which?", files[0])
    conversation.reset()
    assert conversation.turns == 0 and conversation.images == []
    assert conversation.ask("Which?", files[0]) == first


def test_an_answer_that_is_closed_is_kept_as_far_as_it_came(predictor, files):
    conversation = Conversation(predictor)
    pieces = conversation.stream("Which digit is this?", files[0])
    first = next(pieces)
    pieces.close()
    assert conversation.messages[-1] == assistant(first)
    expected = answer_to(predictor, [*conversation.messages, user("And now?")], files[:1])
    assert conversation.ask("And now?") == expected


def test_a_question_that_fails_is_not_part_of_the_dialogue(predictor, files, monkeypatch):
    conversation = Conversation(predictor)
    conversation.ask("Which?", files[0])
    before = conversation.row()
    for text, images, message in (
        ("Which?", ["missing.png"], "missing.png"),
        ("<image> or <image>?", files[:1], "2 <image> markers and 1 image"),
        ("seven " * 3000, [], "shorten the prompt"),
    ):
        with pytest.raises(UserError, match=message):
            conversation.ask(text, images)
        assert conversation.row() == before
    with monkeypatch.context() as patched:
        patched.setattr(predictor.model.lang_encoder, "generate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            conversation.ask("And now?")
    assert conversation.row() == before
    expected = answer_to(predictor, [*before["messages"], user("And now?")], files[:1])
    assert conversation.ask("And now?") == expected


def test_a_conversation_does_not_search_beams(predictor):
    with pytest.raises(UserError, match="num_beams: the answer of beam search cannot be streamed"):
        Conversation(predictor, num_beams=2)
