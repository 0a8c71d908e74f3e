"""Whatever the chat template: an answer is asked for with exactly the tokens that stood before it in
training."""

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
from .dialogues import CHATML, IMAGE, TEMPLATES, assistant, nano_processor, system, user
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


def learned(processor, encoded) -> str:
    return processor.tokenizer.decode([token for token in encoded.labels if token != IGNORED])


def prompts(processor, turns):
    """For each answer: the prompt that asks for it, and the dialogue up to its end as training has it."""
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            yield encode_prompt(processor, turns[:index]), encode(processor, turns[: index + 1])


@pytest.mark.parametrize(
    "make", [nano_processor, llama_processor, lambda text: llama_processor(text, legacy=True)]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_is_what_stands_before_the_answer_in_training_token_for_token(name, make):
    processor = make(FAMILIES[name][0])
    whole = encode(processor, TURNS)
    for prompt, encoded in prompts(processor, TURNS):
        assert encoded.input_ids[: len(prompt)] == whole.input_ids[: len(prompt)] == prompt
        assert whole.labels[len(prompt)] != IGNORED and encoded.labels[len(prompt)] != IGNORED
        assert whole.labels[len(prompt) - 1] == IGNORED


@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_the_answers_and_their_ends_are_learned_in_every_turn(name):
    template, said, *last = FAMILIES[name]
    processor = nano_processor(template)
    for count in (1, 2, 3):
        turns = TURNS[: 2 * count]
        answers = ["Seven.", "Yes.", "Fine."][:count]
        expected = [said.format(answer) for answer in answers]
        expected[-1] = (last or [said])[0].format(answers[-1])
        assert learned(processor, encode(processor, turns)) == "".join(expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_silent_answer_and_a_question_at_the_end_change_nothing_else(name):
    template, said, *_ = FAMILIES[name]
    processor = nano_processor(template)
    turns = [TURNS[0], {**TURNS[1], "loss": False}, *TURNS[2:5]]
    assert learned(processor, encode(processor, turns)) == said.format("Yes.")


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_prompt_is_the_same_as_text_and_in_tokens(name):
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
def test_with_the_templates_of_released_models_prompts_are_how_dialogues_begin(path):
    template = path.read_text(encoding="utf-8")
    processor = llama_processor(template)
    if problem := answer_template(processor.tokenizer, template).problem:
        assert problem.startswith(
            ("leaves out", "refuses")
        )  # those of vision-language models take typed blocks alone
        return
    whole = encode(processor, TURNS)
    for prompt, _ in prompts(processor, TURNS):
        assert whole.input_ids[: len(prompt)] == prompt
    text = learned(processor, whole)
    assert all(text.count(answer) == 1 for answer in ("Seven.", "Yes.", "Fine.")) and "Sure?" not in text


def test_an_answer_with_reasoning_is_refused_where_the_prompt_opens_and_ends_it():
    processor = nano_processor(EMPTY_REASONING)
    assert learned(processor, encode(processor, TURNS)) == "Seven.<|im_end|>Yes.<|im_end|>Fine.<|im_end|>"
    with pytest.raises(
        UserError, match="^chat template: begins an answer differently .*, got it in message 1; remove the"
    ):
        encode(processor, REASONED)


def test_templates_that_fit_are_left_as_they_are():
    for template, _ in TEMPLATES.values():
        processor = nano_processor(template)
        assert processor.answer_template == processor.chat_template


@pytest.mark.parametrize("template", [LAST_REASONING, OPENS_REASONING])
def test_reasoning_that_the_template_keeps_is_learned(template):
    processor = nano_processor(template)
    encoded = encode(processor, REASONED)
    assert learned(processor, encoded) == "Seven.<|im_end|><think>\nr2\n</think>\n\nYes.<|im_end|>"
    for prompt, through in prompts(processor, REASONED):
        assert encoded.input_ids[: len(prompt)] == through.input_ids[: len(prompt)] == prompt
    assert encoded.rewritten
    assert not encode(processor, REASONED[:2]).rewritten and not encode(processor, TURNS).rewritten


def test_an_empty_block_that_the_answer_spells_out_is_learned():
    processor = nano_processor(LAST_REASONING)
    encoded = encode(processor, [user("Which?"), assistant("<think>\n\n</think>\n\nSeven.")])
    assert learned(processor, encoded) == "<think>\n\n</think>\n\nSeven.<|im_end|>"


def test_an_answer_whose_words_the_template_leaves_out_is_counted():
    processor = nano_processor(NEVER_REASONING)
    encoded = encode(processor, REASONED)
    assert encoded.rewritten and learned(processor, encoded) == "\n\nSeven.<|im_end|>Yes.<|im_end|>"
    silent = [{**turn, "loss": False} for turn in REASONED]
    assert not answers_rewritten(processor, silent, "")


def test_the_last_prompt_is_the_dialogues_beginning_where_the_system_message_moves():
    processor = nano_processor(SYSTEM_LAST)
    turns = [system("Be brief."), *TURNS]
    encoded = encode(processor, turns)
    prompt = encode_prompt(processor, turns[:-1])
    assert encoded.input_ids[: len(prompt)] == prompt
    assert learned(processor, encoded) == " Seven.<|im_end|> Yes.<|im_end|> Fine.<|im_end|>"


def test_no_token_holds_the_end_of_a_prompt_and_the_beginning_of_an_answer():
    processor = nano_processor(CHATML)
    tokenizer = type(processor.tokenizer).from_pretrained(processor.tokenizer.name_or_path)
    tokenizer.add_tokens(["\n\n"])
    add_media_tokens(tokenizer)
    processor = FlamingoProcessor(processor.image_processor, tokenizer, chat_template=CHATML)
    turns = [user("Which?\n\n"), assistant("\n\n\nSeven.\n\n"), user("\nSo?"), assistant("\nYes.")]
    encoded = encode(processor, turns)
    assert learned(processor, encoded) == "\n\n\nSeven.\n\n<|im_end|>\nYes.<|im_end|>"
    prompt = encode_prompt(processor, turns[:1])
    assert encoded.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(encoded.input_ids) == processor.apply_chat_template(turns)


def test_answers_in_a_row_are_each_learned():
    for template in (NO_PROMPT, LAST_REASONING, OPENS_REASONING):
        processor = nano_processor(template)
        turns = [user("Which?"), assistant("Seven."), assistant("Or one.")]
        assert learned(processor, encode(processor, turns)) == "Seven.<|im_end|>Or one.<|im_end|>"


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
def test_what_is_saved_asks_as_training_did_whoever_renders_it(own, data, tmp_path):
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
        (FOREIGN_PROMPT, "asks for an answer with other text than it writes before answers"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused_before_any_data_is_read(own, complaint):
    expected = (
        f"^data.template: the language model's chat template {complaint}; set data.template to flamingo$"
    )
    with pytest.raises(UserError, match=expected):
        with_template(own)
    assert encode(with_template(own, template="flamingo"), TURNS).input_ids


def test_a_template_that_wants_a_system_message_is_taken():
    picky = "{% if messages[0].role != 'system' %}{{ raise_exception('whose?') }}{% endif %}" + NO_PROMPT
    processor = with_template(picky)
    turns = [system("Be brief."), *TURNS]
    assert learned(processor, encode(processor, turns)) == "Seven.<|im_end|>Yes.<|im_end|>Fine.<|im_end|>"


def test_a_text_that_the_template_has_begun_gets_no_second_beginning():
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
