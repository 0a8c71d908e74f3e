"""Rows of every format may leave out the answer where answers are generated."""

import pytest

from flamingo_ft.data.unanswered import UNANSWERED, answer_filler

QUESTION = {"role": "user", "content": "Which?"}


@pytest.mark.parametrize(
    ("row", "filled"),
    [
        ({"messages": [QUESTION]}, {"messages": [QUESTION, {"role": "assistant", "content": UNANSWERED}]}),
        (
            {"conversations": [{"from": "human", "value": "Which?"}]},
            {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": UNANSWERED}]},
        ),
        ({"question": "Which?", "image": "a.png"}, {"answer": UNANSWERED}),
        ({"Question": "Which?", "answer": None}, {"answer": UNANSWERED}),
        ({"Question": "Which?", "Answer": " "}, {"Answer": UNANSWERED}),
        ({"instruction": "Name it.", "image": "a.png"}, {"output": UNANSWERED}),
        ({"prompt": "Name it."}, {"completion": UNANSWERED}),
        ({"image": "a.png"}, {"caption": UNANSWERED}),
        ({"question": "Which?", "answers": ["7"]}, {}),
        ({"prompt": "Name it.", "chosen": "a", "rejected": "b"}, {}),
        ({"messages": [QUESTION, {"role": "assistant", "content": "7"}]}, {}),
        ({"messages": []}, {}),
        ({"messages": "text"}, {}),
        ({"image": "a.png", "caption": "A cat."}, {}),
        ({"other": 1}, {}),
    ],
)
def test_a_row_gets_the_answer_that_it_lacks(row, filled):
    assert answer_filler(None, {})(row) == {**row, **filled}


def test_the_answer_is_in_the_column_that_is_named_for_it():
    fill = answer_filler(None, {"question": "ask", "answer": "reply"})
    assert (
        fill({"ask": "Which?", "reply": ""})
        == fill({"ask": "Which?"})
        == {"ask": "Which?", "reply": UNANSWERED}
    )


def test_images_alone_are_asked_the_given_question():
    row = {"images": ["a.png"]}
    assert answer_filler("Which?", {})(row) == {**row, "question": "Which?", "answer": UNANSWERED}
    assert answer_filler("Which?", {})([1]) == [1]
