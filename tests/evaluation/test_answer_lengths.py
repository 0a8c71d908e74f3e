"""Reference answers that `eval.max_new_tokens` would cut off are counted by `check` and before training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flamingo_ft.cli import main
from flamingo_ft.data import Sample, encode
from flamingo_ft.data.encode import encode_prompt
from flamingo_ft.data.sample import DOCUMENT
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.questions import (
    AnswerLengths,
    answer_lengths,
    end_tokens_of,
    measure_answers,
    questions_of,
)
from flamingo_ft.model.processor import CHUNK_TEMPLATE
from flamingo_ft.training import train as train_module
from tests import regimes
from tests.check.small_recipes import asked, checked, write_rows
from tests.data.dialogues import CHATML, IMAGE, LLAMA_2, VICUNA, assistant, nano_processor, user


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def sample(*messages, images: int = 0, **fields) -> Sample:
    return Sample(list(messages), ["a.png"] * images, "task", "here", **fields)


UNLEARNED = {**assistant("Long words."), "loss": False}
SAMPLES = {
    "one answer": sample(user(IMAGE, "Which digit?"), assistant("Three."), images=1),
    "two answers": sample(
        user("Which digit?"), assistant("Three, of all ten."), user("And?"), assistant("Two.")
    ),
    "one of two with loss": sample(user("A?"), UNLEARNED, user("B?"), assistant("B.")),
    "a pair": sample(
        user("A?"), assistant("First."), user("B?"), assistant("Right."), rejected=[assistant("Wrong.")]
    ),
    "a caption": sample({"role": DOCUMENT, "content": [IMAGE, text("A digit.")]}, images=1),
    "a document": sample(
        {"role": DOCUMENT, "content": [IMAGE, text("One long."), IMAGE, text("Two.")]},
        images=2,
    ),
    "a document without images": sample({"role": DOCUMENT, "content": [text("Words.")]}),
}


TEMPLATES = {"chatml": CHATML, "llama": LLAMA_2, "vicuna": VICUNA, "chunks": CHUNK_TEMPLATE}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("name", SAMPLES)
def test_an_answer_is_as_long_as_what_has_to_be_generated_after_its_prompt(name, template):
    processor, one = nano_processor(template), SAMPLES[name]
    questions, ends = questions_of([one]), end_tokens_of(processor)
    lengths = answer_lengths(processor, one, encode(processor, one), ends)
    assert len(lengths) == len(questions)
    for question, length in zip(questions, lengths, strict=True):
        prompt = encode_prompt(processor, question.messages)
        if question.messages[-1]["role"] == DOCUMENT:
            whole = encode(processor, one).input_ids
        else:
            whole = encode(processor, [*question.messages, assistant(question.answer)]).input_ids
        generated = whole[len(prompt) : len(prompt) + length]
        assert processor.tokenizer.decode(generated, skip_special_tokens=True).strip() == question.answer
        assert generated[-1] in ends and not ends & {*generated[:-1]}


def test_only_answers_that_are_too_long_are_counted_and_the_value_to_use_is_named():
    processor, samples = nano_processor(CHATML), [SAMPLES["one answer"], SAMPLES["two answers"]]
    longest = measure_answers(processor, samples, 1000).longest
    assert measure_answers(processor, samples, longest).warning is None
    short = measure_answers(processor, samples, longest - 1)
    assert (short.answers, short.too_long, short.longest) == (3, 1, longest)
    assert "1 of 3 reference answers is longer" in short.warning and f"use {longest} or more" in short.warning
    assert "\n" not in short.warning and AnswerLengths(4).warning is None


# --- the commands ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    regimes.write_run(tmp_path)
    return tmp_path


LONG = {"question": "Which shade?", "answer": "Dark, as far as anybody can tell from here."}


def warned(lines: list[str]) -> list[str]:
    return [line for line in lines if "eval.max_new_tokens" in line]


def test_train_and_check_warn_in_the_same_line_on_stderr(folder, capfd, monkeypatch):
    def stop(*_):
        raise UserError("enough")

    Path("eval.jsonl").write_text(json.dumps(LONG) + "\n" + json.dumps(LONG | {"answer": "Dark."}))
    command = ["./recipe.yaml", "data.eval=[{path: eval.jsonl}]", "eval.max_new_tokens=5"]
    assert main(["check", *command, "--json"]) == 0
    output = capfd.readouterr()
    (line,) = warned(output.err.splitlines())
    assert line.startswith(
        "warning: eval.max_new_tokens: 1 of 2 reference answers is longer than 5 tokens (longest: "
    )
    record = json.loads(output.out)
    assert record["warnings"] == [line.removeprefix("warning: ")]
    assert record["answers"].items() >= {"answers": 2, "too_long": 1, "max_new_tokens": 5}.items()
    assert record["warnings"][0] in Path("runs/check_recipe/check.html").read_text()
    monkeypatch.setattr(train_module, "make_trainer", stop)
    assert main(["train", *command]) == 2
    assert warned(capfd.readouterr().err.splitlines()) == [line]


def test_check_counts_the_answers_that_are_evaluated_and_no_others(tmp_path):
    long, short = asked("?", "Words upon words upon words."), asked("?", "A")
    train = write_rows(tmp_path / "x.jsonl", [long, short])
    eval_file = write_rows(tmp_path / "y.jsonl", [short, asked("?", ""), long, long])  # the second row is bad
    findings = checked(tmp_path, [train], eval=[eval_file])
    assert findings.answers.answers == 3 and findings.answers.longest > 3
    assert checked(tmp_path, [train]).answers.answers == 0


def test_check_stops_counting_at_max_samples_of_each_source(folder, capfd):
    for name in ("a", "b"):
        rows = [LONG | {"answer": answer} for answer in ("A", "B", LONG["answer"])]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        "check",
        "./recipe.yaml",
        "data.eval=[{path: a.jsonl}, {path: b.jsonl}]",
        "eval.max_samples=2",
        "--json",
    ]
    assert main([*command, "eval.max_new_tokens=4"]) == 0
    output = capfd.readouterr()
    assert json.loads(output.out)["answers"]["answers"] == 4 and "warning" not in output.err


def test_check_reports_steps_in_epochs_and_epochs_in_steps(folder, capfd):
    assert main(["check", "./recipe.yaml", "train.max_steps=3"]) == 0
    assert "training: 3 optimizer steps, 3 epochs of 2 samples" in capfd.readouterr().out
    assert main(["check", "./recipe.yaml", "train.epochs=2.5", "train.batch_size=1"]) == 0
    assert "training: 5 optimizer steps, 2.5 epochs of 2 samples" in capfd.readouterr().out
    assert main(["check", "./recipe.yaml", "train.max_steps=4800"]) == 0
    assert "training: 4,800 optimizer steps, 4,800 epochs of 2 samples" in capfd.readouterr().out
    assert main(["check", "./recipe.yaml", "data.train.0.streaming=true"]) == 0
    assert "training: 1 optimizer step\n" in capfd.readouterr().out
