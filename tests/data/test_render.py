"""The recipe's template and system prompt: on the processor, saved with it, the same wherever it is used."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from flamingo_ft.config import DataSection
from flamingo_ft.data.encode import IGNORED, encode, encode_prompt
from flamingo_ft.data.render import apply_template
from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import FlamingoProcessor

from .dialogues import CHATML, IMAGE, LLAMA_2, assistant, nano_processor, system, user

EACH = "{% for m in messages %}"
REFUSAL = "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
NO_SYSTEM = CHATML.replace(EACH, EACH + REFUSAL)
LEAVES_OUT = CHATML.replace(EACH, "{% for m in messages if m['role'] != 'system' %}")
HARD = "You <b> {{ x }} {% if %} \" ' \\n #} é🦩"
SPECIAL_TOKENS = nano_processor().tokenizer.all_special_tokens
PROMPTS = (
    st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1)
    .filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))
    .map(lambda text: HARD + text)
)
TURNS = [user(IMAGE, "Which?"), assistant("Seven."), user("So?"), assistant("Yes.")]


def processor_with(own: str | None, **data) -> FlamingoProcessor:
    """For a language model with its ``own`` chat template, or None."""
    nano = nano_processor()
    tokenizer = type(nano.tokenizer).from_pretrained(nano.tokenizer.name_or_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", "<image>"]})
    tokenizer.chat_template = own
    processor = FlamingoProcessor(nano.image_processor, tokenizer)
    apply_template(processor, DataSection.model_validate({"train": [{"path": "a.json"}], **data}))
    return processor


def written(processor, messages):
    return processor.tokenizer.decode(encode(processor, messages).input_ids)


def test_auto_uses_the_language_models_own_template_if_it_has_one():
    assert written(processor_with(CHATML), TURNS) == written(processor_with(CHATML, template="chat"), TURNS)
    assert written(processor_with(CHATML), TURNS).startswith("<|im_start|>user\n<image>Which?<|im_end|>")
    chunks = "<image>Which? Seven.<|endofchunk|>So? Yes.<|endofchunk|>"
    assert written(processor_with(None), TURNS) == chunks
    assert written(processor_with(CHATML, template="flamingo"), TURNS) == chunks


def test_template_chat_is_refused_if_the_language_model_has_none():
    with pytest.raises(
        UserError, match="^data.template: got chat, but the language model has no chat template; set"
    ):
        processor_with(None, template="chat")


@pytest.mark.parametrize("own", [None, CHATML, LLAMA_2, nano_processor().chat_template])
@given(PROMPTS)
@settings(max_examples=20, deadline=None)
def test_the_system_prompt_precedes_every_dialogue_without_one(own, prompt):
    processor, plain = processor_with(own, system_prompt=prompt), processor_with(own)
    for turns in (TURNS, TURNS[:2]):
        result, expected = encode(processor, turns), encode(plain, [system(prompt), *turns])
        assert (result.input_ids, result.labels) == (expected.input_ids, expected.labels)
    assert encode_prompt(processor, TURNS[:1]) == encode_prompt(plain, [system(prompt), *TURNS[:1]])
    other = [system("Other."), *TURNS]
    assert encode(processor, other) == encode(plain, other)


def test_the_system_prompt_has_no_labels_and_an_answer_may_come_first():
    processor = processor_with(CHATML, system_prompt="{% generation %}Be brief.{% endgeneration %}")
    encoded = encode(processor, [assistant("Hello.")])
    assert processor.tokenizer.decode([t for t in encoded.labels if t != IGNORED]) == "Hello.<|im_end|>"


def test_the_saved_template_writes_the_same(tmp_path):
    processor = processor_with(CHATML, system_prompt="Be brief: é\n'\"")
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert encode(again, TURNS) == encode(processor, TURNS)
    assert again.apply_chat_template(TURNS) == processor.apply_chat_template(TURNS)


@pytest.mark.parametrize(
    ("own", "prompt", "complaint"),
    [
        (NO_SYSTEM, "Be brief.", r"chat template: refuses the dialogue \(no system\).*; set it to null"),
        (LEAVES_OUT, "Be brief.", "the chat template leaves out a system message; set it to null"),
        (CHATML, "See <image>.", "contains the text of a special token"),
    ],
)
def test_a_system_prompt_that_the_template_cannot_write_is_refused(own, prompt, complaint):
    with pytest.raises(UserError, match=f"^data.system_prompt: {complaint}[^\n]*$"):
        processor_with(own, system_prompt=prompt)
