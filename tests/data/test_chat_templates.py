"""For any chat template, a prompt has exactly the tokens that precede the answer in training."""

from pathlib import Path

import pytest
import trl
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor

from flamingo_ft.config import DataSection
from flamingo_ft.data.encode import IGNORED, encode, encode_prompt, end_token_id
from flamingo_ft.data.render import answers_rewritten, apply_template
from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import add_media_tokens
from flamingo_ft.model.chat_template import answer_template
from flamingo_ft.model.processor import FlamingoProcessor

from .chat_templates import (
    CHANNELS,
    EMPTY_REASONING,
    FAMILIES,
    LAST_REASONING,
    MARKED_WITHOUT_PROMPT,
    NEVER_REASONING,
    NO_PROMPT,
    OPENS_REASONING,
    SYSTEM_LAST,
)
from .dialogues import (
    CHATML,
    IMAGE,
    TEMPLATES,
    assistant,
    labelled_text,
    nano_processor,
    prompts,
    system,
    user,
)
from .llama_tokenizer import llama_tokenizer

SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))  # of many model families
SHIPPED = [path for path in SHIPPED if not path.stem.endswith("_training")]
TURNS = [
    *(user(IMAGE, "Which digit?"), assistant("Seven.")),
    *(user("Sure?"), assistant("Yes.")),
    *(user("So?"), assistant("Fine.")),
]
REASONED = [
    *(user("Which?"), assistant("<think>\nr1\n</think>\n\nSeven.")),
    *(user("So?"), assistant("<think>r2</think>Yes.")),
]


def llama_processor(template: str, legacy: bool = False) -> FlamingoProcessor:
    tokenizer = llama_tokenizer(legacy)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]}
    )
    add_media_tokens(tokenizer)
    return FlamingoProcessor(nano_processor().image_processor, tokenizer, chat_template=template)


@pytest.mark.parametrize(
    "make", [nano_processor, llama_processor, lambda text: llama_processor(text, legacy=True)]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_has_exactly_the_tokens_before_the_answer_in_training(name, make):
    processor = make(FAMILIES[name][0])
    whole = encode(processor, TURNS)
    for prompt, encoded in prompts(processor, TURNS):
        assert encoded.input_ids[: len(prompt)] == whole.input_ids[: len(prompt)] == prompt
        assert whole.labels[len(prompt)] != IGNORED and encoded.labels[len(prompt)] != IGNORED
        assert whole.labels[len(prompt) - 1] == IGNORED


@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_the_answers_and_their_end_tokens_have_labels_in_every_turn(name):
    template, answer_format, *last = FAMILIES[name]
    processor = nano_processor(template)
    for count in (1, 2, 3):
        turns = TURNS[: 2 * count]
        answers = ["Seven.", "Yes.", "Fine."][:count]
        expected = [answer_format.format(answer) for answer in answers]
        expected[-1] = (last or [answer_format])[0].format(answers[-1])
        assert labelled_text(processor, encode(processor, turns)) == "".join(expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_without_loss_and_a_last_question_change_no_other_labels(name):
    template, answer_format, *_ = FAMILIES[name]
    processor = nano_processor(template)
    turns = [TURNS[0], {**TURNS[1], "loss": False}, *TURNS[2:5]]
    assert labelled_text(processor, encode(processor, turns)) == answer_format.format("Yes.")


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_renders_the_same_prompt_as_text_and_as_tokens(name):
    for processor in (nano_processor(FAMILIES[name][0]), llama_processor(FAMILIES[name][0])):
        for turns in (TURNS[1:3][1:], TURNS[2:5]):
            expected = encode_prompt(processor, turns)
            how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            assert processor.apply_chat_template(turns, **how)["input_ids"][0] == expected
            text = processor.apply_chat_template(turns, add_generation_prompt=True)
            assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name != "end token after the last answer alone"]
)
def test_generation_stops_at_a_token_that_ends_answers_in_training(name):
    processor = nano_processor(FAMILIES[name][0])
    end = end_token_id(processor)
    assert end is not None
    assert end in [label for label in encode(processor, TURNS).labels]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_prompts_are_prefixes_of_dialogues_with_templates_of_released_models(path):
    template = path.read_text(encoding="utf-8")
    processor = llama_processor(template)
    if problem := answer_template(processor.tokenizer, template).problem:
        # Templates of vision-language models accept typed blocks only.
        assert problem.startswith(("leaves out", "refuses"))
        return
    whole = encode(processor, TURNS)
    for prompt, _ in prompts(processor, TURNS):
        assert whole.input_ids[: len(prompt)] == prompt
    text = labelled_text(processor, whole)
    assert all(text.count(answer) == 1 for answer in ("Seven.", "Yes.", "Fine.")) and "Sure?" not in text


def test_an_answer_with_reasoning_is_refused_if_the_prompt_writes_an_empty_one():
    processor = nano_processor(EMPTY_REASONING)
    assert (
        labelled_text(processor, encode(processor, TURNS)) == "Seven.<|im_end|>Yes.<|im_end|>Fine.<|im_end|>"
    )
    with pytest.raises(
        UserError,
        match="^chat template: begins the answer in message 1 differently than its generation prompt does, "
        "perhaps with reasoning; remove the reasoning from answers, or set data.template to flamingo$",
    ):
        encode(processor, REASONED)


def test_templates_without_problems_are_unchanged():
    for template, _ in TEMPLATES.values():
        processor = nano_processor(template)
        assert processor.answer_template == processor.chat_template


@pytest.mark.parametrize("template", [LAST_REASONING, OPENS_REASONING])
def test_reasoning_that_the_template_keeps_has_labels(template):
    processor = nano_processor(template)
    encoded = encode(processor, REASONED)
    assert labelled_text(processor, encoded) == "Seven.<|im_end|><think>\nr2\n</think>\n\nYes.<|im_end|>"
    for prompt, through in prompts(processor, REASONED):
        assert encoded.input_ids[: len(prompt)] == through.input_ids[: len(prompt)] == prompt
    assert encoded.rewritten
    assert not encode(processor, REASONED[:2]).rewritten and not encode(processor, TURNS).rewritten


def test_an_empty_reasoning_block_in_the_answer_has_labels():
    processor = nano_processor(LAST_REASONING)
    encoded = encode(processor, [user("Which?"), assistant("<think>\n\n</think>\n\nSeven.")])
    assert labelled_text(processor, encoded) == "<think>\n\n</think>\n\nSeven.<|im_end|>"


def test_a_template_that_drops_all_reasoning_keeps_that_of_the_last_answer():
    processor = nano_processor(NEVER_REASONING)
    encoded = encode(processor, REASONED)
    assert encoded.rewritten
    assert labelled_text(processor, encoded) == "\n\nSeven.<|im_end|><think>r2</think>Yes.<|im_end|>"
    without_loss = [{**turn, "loss": False} for turn in REASONED]
    assert not answers_rewritten(processor, without_loss, "")


def test_the_last_prompt_is_a_prefix_if_the_template_moves_the_system_message():
    processor = nano_processor(SYSTEM_LAST)
    turns = [system("Be brief."), *TURNS]
    encoded = encode(processor, turns)
    prompt = encode_prompt(processor, turns[:-1])
    assert encoded.input_ids[: len(prompt)] == prompt
    assert labelled_text(processor, encoded) == " Seven.<|im_end|> Yes.<|im_end|> Fine.<|im_end|>"


def test_no_token_holds_the_end_of_a_prompt_and_the_beginning_of_an_answer():
    processor = nano_processor(CHATML)
    tokenizer = type(processor.tokenizer).from_pretrained(processor.tokenizer.name_or_path)
    tokenizer.add_tokens(["\n\n"])
    add_media_tokens(tokenizer)
    processor = FlamingoProcessor(processor.image_processor, tokenizer, chat_template=CHATML)
    turns = [user("Which?\n\n"), assistant("\n\n\nSeven.\n\n"), user("\nSo?"), assistant("\nYes.")]
    encoded = encode(processor, turns)
    assert labelled_text(processor, encoded) == "\n\n\nSeven.\n\n<|im_end|>\nYes.<|im_end|>"
    prompt = encode_prompt(processor, turns[:1])
    assert encoded.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(encoded.input_ids) == processor.apply_chat_template(turns)


def test_consecutive_answers_all_have_labels():
    for template in (NO_PROMPT, LAST_REASONING, OPENS_REASONING):
        processor = nano_processor(template)
        turns = [user("Which?"), assistant("Seven."), assistant("Or one.")]
        assert labelled_text(processor, encode(processor, turns)) == "Seven.<|im_end|>Or one.<|im_end|>"


def with_template(own: str, **data) -> FlamingoProcessor:
    tokenizer = nano_processor().tokenizer
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    add_media_tokens(tokenizer)
    tokenizer.chat_template = own
    processor = FlamingoProcessor(nano_processor().image_processor, tokenizer)
    apply_template(processor, DataSection.model_validate({"train": [{"path": "a.json"}], **data}))
    return processor


@pytest.mark.parametrize("own", [NO_PROMPT, NEVER_REASONING, LAST_REASONING, CHANNELS, MARKED_WITHOUT_PROMPT])
@pytest.mark.parametrize("data", [{}, {"system_prompt": "{% Be %} brief.\n"}])
def test_the_saved_template_renders_the_prompt_of_training(own, data, tmp_path):
    if own is NEVER_REASONING and data:
        own = own.replace("[User]", "").replace("m.role == 'user'", "m.role != 'assistant'")
    processor = with_template(own, **data)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.chat_template == processor.chat_template == again.answer_template
    assert encode(again, TURNS) == encode(processor, TURNS)
    question = [{"role": "user", "content": "Which?"}]
    text = again.tokenizer.apply_chat_template(
        question, chat_template=again.chat_template, tokenize=False, add_generation_prompt=True
    )
    assert again.tokenizer(text, add_special_tokens=False)["input_ids"] == encode_prompt(processor, question)


LOSES_ANSWERS = CHATML.replace("m['content'] +", "(m['content'] if m['role'] != 'assistant' else '') +")
FOREIGN_PROMPT = (
    "{% if add_generation_prompt %}{{ 'Summary of ' + messages | length | string + ' messages' }}{% else %}"
    "{% for m in messages %}{{ messages | length | string + m.content }}{% endfor %}{% endif %}"
)


@pytest.mark.parametrize(
    ("own", "complaint"),
    [
        ("{{ raise_exception('not\nfor you') }}", r"refuses the dialogue \(not for you\)"),
        (LOSES_ANSWERS, "leaves out the assistant's answers"),
        (FOREIGN_PROMPT, "has a generation prompt that differs from the text before its answers"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused_before_any_data_is_read(own, complaint):
    expected = (
        f"^data.template: the language model's chat template {complaint}; set data.template to flamingo$"
    )
    with pytest.raises(UserError, match=expected):
        with_template(own)
    assert encode(with_template(own, template="flamingo"), TURNS).input_ids


def test_a_template_that_requires_a_system_message_is_accepted():
    requires_system = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('whose?') }}{% endif %}" + NO_PROMPT
    )
    processor = with_template(requires_system)
    turns = [system("Be brief."), *TURNS]
    assert (
        labelled_text(processor, encode(processor, turns)) == "Seven.<|im_end|>Yes.<|im_end|>Fine.<|im_end|>"
    )


def test_a_rendered_text_gets_no_second_bos_token():
    def adds_both(text):
        processor = llama_processor(text)
        processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        return processor

    for name in (
        "inst with a bos",
        "turns without a system role",
        "chatml",
        "line breaks after the end token",
    ):
        processor = adds_both(FAMILIES[name][0])
        expected = encode_prompt(processor, TURNS[2:3])
        text = processor.apply_chat_template(TURNS[2:3], add_generation_prompt=True)
        assert processor(text=text)["input_ids"][0] == expected
        assert processor(text=[text, text])["input_ids"] == [expected, expected]
        assert expected.count(1) <= 1 and expected[-1] != 2
    plain = processor(text="Seven.")["input_ids"][0]
    assert plain[0] == 1 and plain[-1] == 2
    assert processor(text="Seven.", add_special_tokens=False)["input_ids"][0] == plain[1:-1]
