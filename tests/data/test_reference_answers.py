"""Several reference answers of a row reach evaluation; training sees the row as before."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.questions import questions_of, with_other_images
from flamingo_ft.evaluation.results import Results, load_predictions

from .dialogues import IMAGE, assistant, user
from .fixtures import FACTS, put
from .test_columns import read, write


@pytest.fixture
def folder(tmp_path):
    put(tmp_path, FACTS[0][0])
    (tmp_path / FACTS[0][0]).rename(tmp_path / "a.png")
    return tmp_path


def sample_of(folder, **row):
    (sample,) = read(write(folder, [{"image": "a.png", **row}], "x.jsonl"))
    return sample


def references_of(folder, **row):
    (question,) = questions_of([sample_of(folder, **row)])
    return question.references


ANSWERS = ["cat", "dog", "dog", "a dog"]
VQAV2 = [{"answer": answer, "answer_id": i, "answer_confidence": "yes"} for i, answer in enumerate(ANSWERS)]


@pytest.mark.parametrize("answers", [ANSWERS, VQAV2, json.dumps(ANSWERS)], ids=["texts", "VQAv2", "JSON"])
def test_every_answer_is_a_reference_as_often_as_it_was_given_the_trained_one_first(folder, answers):
    assert references_of(folder, question="What?", answers=answers) == ("dog", "cat", "dog", "a dog")
    assert references_of(folder, question="What?", answer="cat", answers=answers) == (
        "cat",
        "dog",
        "dog",
        "a dog",
    )


def test_an_answer_that_is_not_among_the_answers_is_a_reference_too(folder):
    assert references_of(folder, question="What?", answer="Dog.", answers=["dog"]) == ("Dog.", "dog")


def test_every_caption_is_a_reference(folder):
    assert references_of(folder, captions=["A dog. ", " Two", "A pet."]) == ("A dog.", "Two", "A pet.")


def test_a_single_answer_is_the_only_reference(folder):
    assert references_of(folder, question="What?", answer="dog") == ("dog",)
    assert references_of(folder, question="What?", answers=["dog"]) == ("dog",)
    assert references_of(folder, caption="A dog.") == ("A dog.",)


@pytest.mark.parametrize("answers", [None, "dog", 3, [], [None, "", 4.5, {"answer": " "}, ["x"], "\ud800"]])
def test_what_training_does_not_read_is_not_refused(folder, answers):
    references = references_of(folder, question="What?", answer="cat", answers=answers)
    assert references == (("cat", "4.5") if isinstance(answers, list) and answers else ("cat",))
    with pytest.raises(UserError):
        sample_of(folder, question="What?", answers=answers if answers is not None else [None])


def test_training_sees_the_row_without_its_other_answers(folder):
    several = sample_of(folder, question="What?", answers=ANSWERS)
    single = sample_of(folder, question="What?", answer="dog")
    assert several.messages == single.messages == [user(IMAGE, "What?"), assistant("dog")]
    assert replace(several, other_answers=()) == single


def test_references_stay_with_their_question_when_the_images_are_exchanged(folder):
    samples = [sample_of(folder, question="What?", answers=ANSWERS), sample_of(folder, captions=["A", "B"])]
    before, after = questions_of(samples), questions_of(with_other_images(samples))
    assert [question.references for question in before] == [question.references for question in after]


def test_any_reference_is_right_and_predictions_list_them_where_there_are_several(folder, tmp_path):
    samples = [
        sample_of(folder, question="What?", answers=ANSWERS),
        sample_of(folder, question="?", answer="x"),
    ]
    results = Results(questions_of(samples), {"after": ["Cat.", "y"]})
    assert results.summary()["accuracy"] == 0.5
    results.save(tmp_path)
    first, second = load_predictions(tmp_path)
    assert first["answer"] == "dog" and first["references"] == ["dog", "cat", "dog", "a dog"]
    assert second["answer"] == "x" and "references" not in second
