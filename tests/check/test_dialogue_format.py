"""A check shows the tokens around answers, the stopping tokens, and answers that the template changes."""

from __future__ import annotations

import json

import pytest

from flamingo_ft import cli
from flamingo_ft.adapters.answering import end_token_ids
from flamingo_ft.backbones.language import load_language
from flamingo_ft.check.text_checks import ANSWER, QUESTION, dialogue_format
from flamingo_ft.config import ModelSection
from flamingo_ft.data.encode import IGNORED, encode, encode_prompt
from flamingo_ft.model.build import eos_token_ids
from tests.check.small_recipes import asked, checked, language_without_weights, write_rows
from tests.data.chat_templates import FAMILIES, LAST_REASONING
from tests.data.dialogues import TEMPLATES, assistant, nano_processor, user
from tests.data.test_chat_templates import llama_processor

ALL = {**{name: template for name, (template, *_) in FAMILIES.items()}, "chunk": TEMPLATES["chunk"][0]}


@pytest.mark.parametrize("make", [nano_processor, llama_processor])
@pytest.mark.parametrize("name", ALL)
def test_the_reported_format_is_that_of_training_and_prompts(name, make):
    processor = make(ALL[name])
    shown = dialogue_format(processor, 0)
    encoded = encode(processor, [user(QUESTION), assistant(ANSWER)])
    name_of = processor.tokenizer.convert_ids_to_tokens
    learned = name_of([label for label in encoded.labels if label != IGNORED])
    assert name_of(encoded.input_ids)[: len(shown.begins.tokens)] == shown.begins.tokens
    if shown.ends.tokens:
        assert learned[-len(shown.ends.tokens) :] == shown.ends.tokens
    prompt = name_of(encode_prompt(processor, [user(QUESTION)]))
    assert prompt[len(prompt) - len(shown.prompt.tokens) :] == shown.prompt.tokens
    assert shown.learns_to_stop == (shown.ends.tokens[-1] in shown.stops) and shown.warning is None
    assert "<|endofchunk|>" in shown.stops


def test_the_stopping_tokens_are_those_of_the_model():
    processor = nano_processor()
    section = ModelSection.model_validate({"vision": {"name": "nano"}, "language": {"name": "nano"}})
    stops = processor.tokenizer.convert_ids_to_tokens(end_token_ids(load_language("nano").model, processor))
    assert dialogue_format(processor, eos_token_ids(section)).stops == stops


def test_a_template_without_a_stopping_token_causes_a_warning():
    shown = dialogue_format(nano_processor(TEMPLATES["end outside the marks"][0]), None)
    assert not shown.learns_to_stop and "answers run on until eval.max_new_tokens" in shown.warning


def test_check_reports_how_dialogues_are_written(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", [asked("?", "A")])
    backbones = ["model.vision.name=nano", "model.language.name=nano"]
    recipe = tmp_path / "recipe.yaml"
    data = f"data:\n  train: [{{path: {tmp_path}/a.jsonl}}]\n"
    recipe.write_text(data + f"train: {{max_steps: 1, output_dir: {tmp_path}/run}}\n")
    assert (
        cli.main(["check", str(recipe), *backbones, "train.num_workers=0", "--out", str(tmp_path / "check")])
        == 0
    )
    line = (
        'dialogues begin with "<|im_start|>user\\n"; "<|im_end|>\\n<|im_start|>assistant\\n" precedes '
        'answers, which end with "<|im_end|>" (then "\\n", not in the loss)'
    )
    lines = capsys.readouterr().out.splitlines()
    assert line in lines and "generation stops at <|im_end|> or <|endofchunk|>" in lines
    record = json.loads((tmp_path / "check" / "check.json").read_text())
    assert record["text_form"]["ends"] == {"text": "<|im_end|>", "tokens": ["<|im_end|>"]}
    assert record["text_lines"][0] == line and record["warnings"] == []
    assert "precedes answers, which end with" in (tmp_path / "check" / "check.html").read_text()


def test_samples_whose_answers_the_template_changes_are_counted(tmp_path):
    language = language_without_weights(tmp_path / "language", LAST_REASONING)
    answer = {"role": "assistant", "content": "<think>why</think>Seven."}
    question = {"role": "user", "content": "?"}
    rows = [
        {"messages": [question, answer]},
        {"messages": [question, answer, question, answer]},
        asked("?", "A"),
    ]
    findings = checked(tmp_path, [write_rows(tmp_path / "a.jsonl", rows)], language=language)
    assert findings.parts[0].rewritten == 1
    (line,) = findings.warnings
    assert line.startswith("the chat template leaves out or changes words of answers in 1 samples")
