"""The verdict on a run follows from its answers with the right and with other images."""

from __future__ import annotations

import random
from dataclasses import replace
from operator import eq

import pytest

from flamingo_ft.data import Sample
from flamingo_ft.data.sample import DOCUMENT
from flamingo_ft.evaluation.image_loss_gap import ImageLossGap
from flamingo_ft.evaluation.image_use import MIN_QUESTIONS, image_use
from flamingo_ft.evaluation.questions import Question, questions_of
from flamingo_ft.evaluation.reference_answers import is_free_text
from flamingo_ft.evaluation.results import Results
from tests.data.dialogues import IMAGE, assistant, user

ABOVE, NEAR_ZERO = ImageLossGap(0.4, 0.05, 200), ImageLossGap(0.01, 0.02, 200)
COLOURS = ("Red.", "Green.", "Blue.", "Red.")


def questions(answers, images: int = 1):
    content = [*[IMAGE] * images, {"type": "text", "text": "Which?"}]
    samples = [
        Sample([user(*content), assistant(answer)], ["a.png"] * images, "t", f"row {n}")
        for n, answer in enumerate(answers)
    ]
    return questions_of(samples)


def references(count: int = 200) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def partly(right: list[str], share: float, seed: int) -> list[str]:
    """The right answers, but for a share of them, which are of another question."""
    draw = random.Random(seed)
    return [draw.choice(COLOURS) if draw.random() > share else answer for answer in right]


def test_a_model_that_uses_its_images_is_reported_with_both_accuracies():
    correct = references()
    assert image_use(questions(correct), correct, partly(correct, 0.0, 1)).startswith(
        "reads the images: 100.0 % right, against "
    )


def test_a_model_that_ignores_its_images_is_reported_with_a_remedy():
    correct = references()
    verdict = image_use(questions(correct), ["Red."] * 200, ["Red."] * 200)
    assert verdict.startswith(
        "the model is not looking: answers barely change with another image (50.0 % right, against 50.0 %"
    )
    assert "train longer" in verdict and "train.learning_rates.gates" in verdict


@pytest.mark.parametrize("seed", range(5))
def test_guesses_that_differ_by_chance_are_not_mistaken_for_reading_the_images(seed):
    correct = references()
    guesses, others = (partly(correct, 0.0, number) for number in (2 * seed, 2 * seed + 1))
    gain = sum(map(eq, guesses, correct)) - sum(map(eq, others, correct))
    expected = (
        "whether the model uses its images is unclear: "
        if gain > 0.02 * len(correct)
        else "the images are of no use to the model: answers change with another image"
    )
    assert image_use(questions(correct), guesses, others).startswith(expected)


def test_a_model_no_better_than_the_most_frequent_answer_is_reported_as_such():
    correct = references()
    right = [answer if number % 5 < 2 else "?" for number, answer in enumerate(correct)]
    assert "no better than always giving the most frequent answer (50.0 %)" in image_use(
        questions(correct), right, ["?"] * 200
    )


def of_tasks(**right: tuple[int, int]) -> str:
    """Return the verdict on 100 questions of each task, answered right so often: with the right image and
    with another."""
    asked, answers, shuffled = [], [], []
    for task, (correct, correct_shuffled) in right.items():
        asked += [replace(question, task=task) for question in questions(references(100))]
        answers += references(100)[:correct] + ["Black."] * (100 - correct)
        shuffled += ["White."] * (100 - correct_shuffled) + references(100)[100 - correct_shuffled :]
    return image_use(asked, answers, shuffled)


def test_tasks_whose_answers_do_not_need_the_image_are_named():
    verdict = of_tasks(lines=(80, 40), currency=(60, 60), price=(1, 0))
    assert verdict.startswith(
        "reads the images in lines; no clear gain from them in currency, price: 47.0 % right, against 33.3 %"
    )
    assert "train longer" in verdict
    assert of_tasks(lines=(80, 40), currency=(80, 30)).startswith("reads the images: 80.0 % right")
    assert "no clear gain from them in a, b, c, d, e and 2 more tasks" in of_tasks(
        lines=(90, 20), **{name: (50, 50) for name in "abcdefg"}
    )


def test_a_task_that_needs_the_image_is_not_hidden_by_those_that_do_not():
    others = {name: (50, 50) for name in "abcdefghi"}
    assert of_tasks(lines=(70, 40), **others).startswith("reads the images in lines; no clear gain from them")


def test_a_small_gain_on_all_questions_is_said_to_be_small():
    assert of_tasks(a=(57, 43), b=(56, 44), c=(57, 43)).startswith(
        "reads the images a little, clearly in no single task: 56.7 % right, against 43.3 %"
    )
    assert of_tasks(a=(53, 47)).startswith(
        "whether the model uses its images is unclear: 53.0 % right, against 47.0 % with another image, "
        "which may be chance"
    )


def test_the_baseline_is_the_most_frequent_answer_of_each_task():
    asked = [
        replace(question, task=task)
        for task, answer in (("a", "Red."), ("b", "Blue."))
        for question in questions([answer] * 80 + ["Green."] * 20)
    ]
    right = ["Red."] * 60 + ["?"] * 40 + ["Blue."] * 60 + ["?"] * 40
    verdict = image_use(asked, right, ["?"] * 200)
    assert "no better than always giving the most frequent answer (80.0 %)" in verdict


def test_nothing_is_concluded_from_few_questions_or_from_ones_without_images():
    few = references(MIN_QUESTIONS - 1)
    assert image_use(questions(few), few, few).startswith("too few held-out questions with images")
    assert image_use(questions(few, images=0), few, few) is None


def test_only_questions_with_images_count():
    correct = references(60)
    mixed = questions(correct[:30]) + questions(correct[30:], images=0)
    assert image_use(mixed, correct, ["?"] * 30 + correct[30:]).startswith(
        "reads the images: 100.0 % right, against 0.0 %"
    )


def test_free_text_is_judged_by_whether_it_changes_with_the_image():
    captions = [f"A bird number {number} sits on the branch." for number in range(40)]
    blocks = [[IMAGE, {"type": "text", "text": text}] for text in captions]
    captioned = questions_of(
        [Sample([{"role": DOCUMENT, "content": one}], ["a.png"], "t", "row") for one in blocks]
    )
    other = captions[1:] + captions[:1]
    assert image_use(captioned, captions, other, ABOVE).startswith(
        "reads the images: another image changes the loss by +0.4 ± 0.05 nats per label token, "
        "clearly above zero; 100 % of the answers change"
    )
    assert image_use(captioned, captions, other, NEAR_ZERO).startswith(
        "the images are of no use to the model"
    )
    assert image_use(captioned, captions, captions, NEAR_ZERO).startswith("the model is not looking")
    assert "the answers depend on the images (100 %" in image_use(captioned, captions, other)
    assert image_use(captioned, captions, captions).startswith(
        "the model is not looking: 0 % of the answers change"
    )


def test_a_gap_that_is_not_distinguishable_from_zero_is_reported_with_a_remedy():
    correct = references()
    verdict = image_use(questions(correct), ["Red."] * 200, ["Red."] * 200, NEAR_ZERO)
    assert verdict.startswith("the model is not looking")
    assert "+0.01 ± 0.02 nats per label token, not distinguishable from zero" in verdict
    assert "train longer, raise train.learning_rates.gates" in verdict
    verdict = image_use(questions(correct), correct, partly(correct, 0.0, 1), NEAR_ZERO)
    assert verdict.startswith("reads the images, yet the loss does not show it")


def test_a_model_whose_loss_alone_shows_that_it_looks_is_not_said_to_be_blind():
    correct = references()
    verdict = image_use(questions(correct), ["Red."] * 200, ["Red."] * 200, ABOVE)
    assert verdict.startswith("the model looks at the images, but not enough to answer better: 50.0 % right")
    assert "clearly above zero" in verdict and "train longer" in verdict


@pytest.mark.parametrize(
    ("gap", "conclusion"),
    [
        (ImageLossGap(0.31, 0.1, 20), "clearly above zero"),
        (ImageLossGap(0.29, 0.1, 20), "not distinguishable from zero"),
        (
            ImageLossGap(-0.31, 0.1, 20),
            "clearly below zero: the images mislead the model, a sign of overfitting",
        ),
        (ImageLossGap(0.0, 0.0, 20), "not distinguishable from zero"),
        (ImageLossGap(0.31, 0.1, 19), None),
        (ImageLossGap(float("nan"), 0.1, 20), None),
    ],
)
def test_three_standard_errors_from_zero_are_clear(gap, conclusion):
    assert gap.conclusion == conclusion


def test_a_gap_of_too_few_samples_does_not_change_the_verdict():
    correct, few = references(), ImageLossGap(0.4, 0.05, 19)
    other = partly(correct, 0.0, 1)
    assert image_use(questions(correct), correct, other, few) == image_use(questions(correct), correct, other)


def test_the_majority_is_what_always_giving_the_most_frequent_answer_reaches():
    for answers, share in ((references(), 0.5), (["a", "A.", "b"], 2 / 3)):
        summary = Results(questions(answers), {"after": answers}).summary()
        assert summary["accuracy_majority"] == pytest.approx(share)
        assert summary["per_task"]["t"]["majority"] == pytest.approx(share)


def classes(correct, answers):
    return Results(questions(correct), {"after": answers}).summary()["per_task"]["t"]["classes"]


def test_classes_have_their_own_accuracy_and_how_often_they_were_predicted():
    correct = references(8)
    assert classes(correct, ["Red."] * 6 + ["Blue.", "green"]) == {
        "Red.": {"samples": 4, "accuracy": 0.75, "predicted": 6},
        "Blue.": {"samples": 2, "accuracy": 0.5, "predicted": 1},
        "Green.": {"samples": 2, "accuracy": 0.0, "predicted": 1},
    }
    assert classes(["a", "b", "c"], ["a", "b", "c"]) is None, "each answer occurs once: no classes"
    assert classes(["a"] * 9, ["a"] * 9) is None


@pytest.mark.parametrize(
    ("answers", "free"),
    [
        (["Yes.", "No."] * 5, False),
        ([f"A dog runs over field {number}." for number in range(10)], True),
        (["The first of the two."] * 10, False),
        (["Seven", "Eight and nine"] * 5, False),
    ],
)
def test_sentences_that_hardly_repeat_are_free_text(answers, free):
    assert is_free_text(questions(answers)) == free


@pytest.mark.parametrize(
    ("captions", "free"),
    [
        (["animals", "food", "vehicles"] * 5, False),
        (["a heron", "a boat", "two boats"], True),
        (["A dog runs over a field.", "A boat on a lake."] * 5, True),
    ],
)
def test_captions_are_free_text_unless_they_are_a_few_short_ones(captions, free):
    prompt = [{"role": DOCUMENT, "content": [{"type": "image"}]}]
    asked = [Question(prompt, ["a.png"], f"row {row}", text) for row, text in enumerate(captions)]
    assert is_free_text(asked) == free
