"""results.html shows the wrong answers first, and what was answered in place of what."""

import re

import pytest
from PIL import Image

from flamingo_ft.evaluation.metrics import ACCURACY
from flamingo_ft.evaluation.questions import Question
from flamingo_ft.evaluation.results_page import OTHER, confusion_matrices, write_results_page
from tests.data.dialogues import IMAGE, user


@pytest.fixture
def questions(tmp_path):
    Image.new("RGB", (40, 20), (200, 0, 0)).save(tmp_path / "a.png")
    images = [str(tmp_path / "a.png"), str(tmp_path / "gone.png")]
    return [
        Question(
            [user(IMAGE, "<b>Which?")], [images[number % 2]], f"row {number}", "yn"[number % 2], "digits"
        )
        for number in range(6)
    ]


def test_wrong_answers_come_first_and_text_is_escaped(questions, tmp_path):
    answers = {"after": ["y", "n", "y", "<i>", "n", "n"], "shuffled_images": ["n"] * 6}
    write_results_page(tmp_path / "page.html", "A & B", ["looks"], questions, answers, [ACCURACY])
    page = (tmp_path / "page.html").read_text()
    assert re.findall(r'data-kind="(\w+)"', page) == ["wrong", "wrong", *["right"] * 4]
    assert re.findall(r"row (\d)", page) == ["3", "4", "0", "1", "2", "5"]
    assert "A &amp; B" in page and "&lt;b&gt;Which?" in page and "<i>" not in page
    assert page.count("data:image/jpeg") == 3 and "with another image" in page


def test_a_confusion_matrix_counts_what_was_given_for_each_reference(questions):
    matrices = confusion_matrices(questions, ["y", "n", "n.", "maybe", "Y", "y"])
    assert matrices == {"digits": (["n", "y", OTHER], [("n", [1, 1, 1]), ("y", [1, 2, 0])])}
