"""A check of preference pairs, labelled answers and questions of GRPO encodes them as training does."""

from __future__ import annotations

import re

from PIL import Image

from flamingo_ft.check.check_data import check_data
from flamingo_ft.check.text_checks import TextInspector
from flamingo_ft.config import GrpoSection
from flamingo_ft.data.encode import encode
from flamingo_ft.data.pairs import encode_pair
from flamingo_ft.data.prompts import encode_question
from flamingo_ft.data.sample import Sample
from tests.check.small_recipes import asked, checked, problem_lines, recipe, write_rows
from tests.data.dialogues import assistant, nano_processor, user

SHORT, LONG = "No.", "No, " + "no, " * 40 + "no."


def pair(chosen: str, rejected: str) -> dict:
    before = [("user", "Which?"), ("assistant", "Seven, that is what I see."), ("user", "Sure?")]
    prompt = [{"role": role, "content": content} for role, content in before]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def written(folder, *pairs) -> list:
    return [write_rows(folder / "x.jsonl", [pair(*one) for one in pairs])]


def test_a_chosen_or_rejected_answer_that_is_too_long_is_a_problem(tmp_path):
    train = written(tmp_path, ("Yes.", SHORT), (LONG, SHORT), ("Yes.", LONG))
    findings = checked(tmp_path, train, method="dpo", max_text_tokens=60)
    assert findings.parts[0].samples == 1
    lines = problem_lines(tmp_path)
    assert [line.split(": got ")[0] for line in lines] == [f"{tmp_path}/x.jsonl: row {row}" for row in (1, 2)]
    assert all("the limit is 60" in line for line in lines)


def test_only_the_last_answers_count_as_learned_not_earlier_assistant_turns(tmp_path):
    train = written(tmp_path, ("Yes, I am sure of it.", SHORT), (SHORT, "Yes, I am sure of it."))
    (part,) = checked(tmp_path, train, method="dpo").parts
    messages = [
        user("Which?"),
        assistant("Seven, that is what I see."),
        user("Sure?"),
        assistant("Yes, I am sure of it."),
    ]
    longer = encode_pair(nano_processor(), Sample(messages, [], "other", "", [assistant(SHORT)]), 500).chosen
    assert (part.text_tokens, part.label_tokens) == (2 * longer.text_tokens, 2 * longer.label_tokens)
    shown = re.sub("<[^>]*>", "", (tmp_path / "check" / "check.html").read_text())
    assert shown.count("Yes, I am sure of it.") == shown.count("No.") == 2


def test_a_policy_truncates_both_texts_of_a_pair(tmp_path):
    messages = [user("Sure?"), assistant("Yes.")]
    sample = Sample(messages, [], "other", "x", [assistant(LONG)])
    data = recipe(tmp_path, written(tmp_path), method="dpo", too_long="drop_sample").data
    text = TextInspector(nano_processor(), data, 60, "dpo")(sample)
    whole = encode_pair(nano_processor(), sample, 500)
    assert text.encoded is None and text.problem is None
    assert text.losses["drop_sample"]["tokens"] == whole.chosen.text_tokens + whole.rejected.text_tokens
    assert text.losses["truncate_text"] == {
        "samples": 0,
        "turns": 0,
        "tokens": whole.rejected.text_tokens - 60,
        "images": 0,
    }


def test_a_labelled_answer_is_learned_as_kto_trains_on_it(tmp_path):
    prompt = pair("", "")["prompt"]
    rows = [{"prompt": prompt, "completion": text, "label": text == "Yes."} for text in ("Yes.", SHORT)]
    train = [write_rows(tmp_path / "x.jsonl", rows)]
    (part,) = checked(tmp_path, train, method="kto").parts
    answers = [encode(nano_processor(), [user("Sure?"), assistant(text)]) for text in ("Yes.", SHORT)]
    assert part.label_tokens == sum(answer.label_tokens for answer in answers)


def test_the_same_answer_with_both_labels_is_no_duplicate(tmp_path):
    rows = [{"prompt": "Sure?", "completion": "Yes.", "label": label} for label in (True, False, True)]
    findings = checked(tmp_path, [write_rows(tmp_path / "x.jsonl", rows)], method="kto")
    assert findings.repeats.copies == 1


def test_questions_of_grpo_are_checked_as_training_encodes_them_and_held_out_rows_as_its_loss_does(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    question, caption = asked("Which?", LONG), {"image": "x.png", "caption": "A square."}
    long = asked("Which" + " one" * 20 + "?", "This.")
    video = {"question": "What?", "answer": "A square.", "videos": [["x.png", "x.png"]]}
    train = [write_rows(tmp_path / "questions.jsonl", [question, long])]
    train += [write_rows(tmp_path / f"{name}.jsonl", [row]) for name, row in (("c", caption), ("v", video))]
    held_out = [write_rows(tmp_path / "held_out.jsonl", [caption])]
    config = recipe(tmp_path, train, method="grpo", max_text_tokens=40, eval=held_out)
    grpo = GrpoSection(max_completion_tokens=20)
    config = config.model_copy(update={"train": config.train.model_copy(update={"grpo": grpo})})
    findings = check_data(config, "test", tmp_path / "check")
    lines = [line.removeprefix(f"{tmp_path}/") for line in problem_lines(tmp_path)]
    assert re.fullmatch(
        r"questions.jsonl: row 1: got \d+ text tokens before the answer, the limit is 20; .*", lines[0]
    )
    assert lines[1].startswith("c.jsonl: row 0: got a caption or document; grpo needs a question")
    assert lines[2] == "v.jsonl: row 0: got a video; grpo takes images only" and len(lines) == 3
    assert [part.samples for part in findings.parts] == [1, 0, 0, 1] and findings.objection
    sample = Sample([user("Which?"), assistant(LONG)], [], "other", "x")
    tokens = encode_question(nano_processor(), sample, 500).text_tokens
    assert (findings.parts[0].text_tokens, findings.parts[0].label_tokens) == (tokens, 0)
