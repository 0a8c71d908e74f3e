"""With the tokenizer and chat template of each released language model, labels are exactly the answers."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from flamingo_ft.adapters.answering import stop_token_ids
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.config import DataSection
from flamingo_ft.data.encode import IGNORED, encode, encode_prompt
from flamingo_ft.data.render import apply_template
from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import add_media_tokens
from flamingo_ft.model.processor import FlamingoProcessor
from tests.data.dialogues import IMAGE, assistant, labelled_text, prompts, system, user

from .published_models import MODELS, PublishedModel, write_model

SYSTEM = system("Be brief.")
DIALOGUE = [
    *(user(IMAGE, "Which shade?"), assistant("Dark.")),
    *(user("Sure?"), assistant("Yes.")),
    *(user("So?"), assistant("Fine.")),
]
THOUGHT = "<think>\n{}\n</think>\n\n{}"
REASONED = [
    *(user(IMAGE, "Which?"), assistant(THOUGHT.format("r0", "Seven."))),
    *(user("So?"), assistant(THOUGHT.format("r1", "Yes."))),
]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def released(request, tmp_path_factory) -> tuple[PublishedModel, FlamingoProcessor]:
    """Return a model and its processor, as training sets it up."""
    model = request.param
    folder = write_model(tmp_path_factory.mktemp("models") / "lm", model)
    return model, processor_of(AutoTokenizer.from_pretrained(folder))


def processor_of(tokenizer, **data) -> FlamingoProcessor:
    add_media_tokens(tokenizer)
    processor = FlamingoProcessor.for_backbones(load_vision("nano").preprocess, tokenizer)
    apply_template(processor, DataSection.model_validate({"train": [{"path": "a.json"}], **data}))
    return processor


def answers(model: PublishedModel, *words: str) -> str:
    """Return the text in the loss for these answers."""
    *earlier, last = words
    return "".join(map(model.answer.format, earlier)) + (model.last or model.answer).format(last)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_labels_are_exactly_the_answers_and_their_end_tokens(released, turns):
    model, processor = released
    words = ["Dark.", "Yes.", "Fine."][:turns]
    for before in ([], [SYSTEM]) if model.has_system else ([],):
        encoded = encode(processor, [*before, *DIALOGUE[: 2 * turns]])
        assert labelled_text(processor, encoded) == answers(model, *words)
        assert encoded.images == 1 and not encoded.rewritten
        text = processor.tokenizer.decode(encoded.input_ids)
        assert ("Be brief." in text) == bool(before)


def test_the_prompt_has_exactly_the_tokens_before_the_answer_in_training(released):
    _, processor = released
    for turns in (DIALOGUE, REASONED):
        for prompt, encoded in prompts(processor, turns):
            assert encoded.input_ids[: len(prompt)] == prompt
            assert encoded.labels[len(prompt) - 1] == IGNORED != encoded.labels[len(prompt)]


def test_the_reasoning_of_the_last_answer_has_labels(released):
    model, processor = released
    first, second = THOUGHT.format("r0", "Seven."), THOUGHT.format("r1", "Yes.")
    encoded = encode(processor, REASONED[:2])
    assert labelled_text(processor, encoded) == answers(model, first) and not encoded.rewritten
    encoded = encode(processor, REASONED)
    before = model.earlier.format("Seven.") if model.earlier else model.answer.format(first)
    assert labelled_text(processor, encoded) == before + answers(model, second)
    assert encoded.rewritten == (model.earlier is not None)
    for mark in {"<think>", "</think>"} & {*model.tokenizer.added}:
        assert encoded.labels.count(processor.tokenizer.convert_tokens_to_ids(mark)) == 2 - encoded.rewritten


def test_a_prompt_begins_with_one_bos_token_if_the_template_writes_one(released):
    model, processor = released
    bos = processor.tokenizer.bos_token_id
    question = [user("Which shade?")]
    prompt = encode_prompt(processor, question)
    writes_bos = "bos_token" in model.template.read_text(encoding="utf-8")
    assert [token == bos for token in prompt[:2]] == [writes_bos, False]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    assert processor(text=text)["input_ids"][0] == prompt


def test_generation_ends_where_the_answer_ends_in_training_and_at_every_published_end_token(released):
    model, processor = released
    published = processor.tokenizer.convert_tokens_to_ids([*model.stops])
    stops = stop_token_ids(processor, published)
    labels = [label for label in encode(processor, DIALOGUE).labels if label != IGNORED]
    assert {*published, labels[-1]} <= {*stops}
    assert processor.decode(published, skip_special_tokens=True) == ""


@pytest.mark.parametrize("prompt", ["/no_think", "/no_think Be brief."])
def test_a_system_prompt_turns_off_the_thinking_of_smollm3(prompt, tmp_path):
    smollm3 = next(model for model in MODELS if model.model_type == "smollm3")
    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path / "lm", smollm3))
    processor = processor_of(tokenizer, system_prompt=prompt)
    asked = tokenizer.decode(encode_prompt(processor, DIALOGUE[:1]))
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n")
    assert "Reasoning Mode: /no_think" in asked and ("Be brief." in asked) == ("Be brief." in prompt)
    encoded = encode(processor, DIALOGUE[:4])
    assert labelled_text(processor, encoded) == "Dark.<|im_end|>Yes.<|im_end|>"


def test_a_system_prompt_may_be_the_one_that_the_template_writes_anyway(tmp_path):
    qwen = next(model for model in MODELS if model.name == "Qwen/Qwen2.5-7B-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path / "lm", qwen))
    own = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    with_own, without = (
        encode_prompt(processor_of(tokenizer, system_prompt=text), DIALOGUE[:1]) for text in (own, None)
    )
    assert with_own == without and own in tokenizer.decode(without)


@pytest.mark.parametrize("name", [model for model in MODELS if not model.has_system], ids=str)
def test_a_template_without_a_system_role_is_reported_in_one_line(name, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path / "lm", name))
    with pytest.raises(
        UserError, match="^chat template: refuses the dialogue .*set data.template to flamingo$"
    ):
        encode(processor_of(tokenizer), [SYSTEM, *DIALOGUE])
    with pytest.raises(
        UserError, match="^data.system_prompt: .*set it to null, or data.template to flamingo$"
    ):
        processor_of(tokenizer, system_prompt="Be brief.")
    assert encode(processor_of(tokenizer, template="flamingo"), [SYSTEM, *DIALOGUE]).input_ids
