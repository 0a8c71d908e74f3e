"""Questions from held-out samples, and the same with other images."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_ft.data import Sample
from flamingo_ft.evaluation.questions import questions_of, with_other_images
from tests.data.dialogues import IMAGE, assistant, system, user


def sample(*images: str, question: str = "Which?") -> Sample:
    messages = [user(*[IMAGE] * len(images), question), assistant("That.")]
    return Sample(messages, list(images), "all", "here")


IMAGES = st.lists(st.sampled_from("abcdef"), max_size=3)


@given(st.lists(IMAGES, max_size=12), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_every_sample_gets_other_images_if_another_has_as_many(images, seed):
    samples = [sample(*each) for each in images]
    shuffled = with_other_images(samples, seed)
    assert len(shuffled) == len(samples)
    for index, (before, after) in enumerate(zip(samples, shuffled, strict=True)):
        others = [each for i, each in enumerate(images) if i != index and len(each) == len(before.images)]
        assert (after.messages, after.task, after.where) == (before.messages, before.task, before.where)
        assert len(after.images) == len(before.images)
        assert after.images in [*others, before.images]
        if any(other != before.images for other in others):
            assert after.images != before.images
        if any(not set(other) & set(before.images) for other in others):
            assert not set(after.images) & set(before.images)


@given(st.lists(IMAGES, max_size=12), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_the_exchange_is_the_same_for_the_same_seed_and_leaves_the_samples_alone(images, seed):
    samples = [sample(*each) for each in images]
    assert with_other_images(samples, seed) == with_other_images(samples, seed)
    assert [each.images for each in samples] == images


def test_distinct_images_are_each_shown_once():
    """So that the share of every right answer among the shown images stays what it was."""
    samples = [sample(f"{index}.png") for index in range(50)]
    shown = Counter(each.images[0] for each in with_other_images(samples))
    assert set(shown.values()) == {1} and len(shown) == 50


def test_several_questions_about_one_image_are_asked_about_others():
    """The rows of one image stand together in most files."""
    samples = [sample(f"{index // 4}.png", question=f"{index}?") for index in range(40)]
    for before, after in zip(samples, with_other_images(samples), strict=True):
        assert before.images != after.images


def test_every_assistant_turn_is_a_question_with_the_turns_and_images_before_it():
    dialogue = [
        system("Be brief."),
        user(IMAGE, "Which digit?"),
        assistant("Seven."),
        user("Larger than ", IMAGE, " and ", IMAGE, "?"),
        assistant("Yes", ", it is."),
        user("Sure?"),
        assistant("Yes."),
        user("Thanks."),
    ]
    other = sample("d")
    first, second, third, last = questions_of([Sample(dialogue, ["a", "b", "c"], "compare", "row 3"), other])
    assert [q.answer for q in (first, second, third)] == ["Seven.", "Yes, it is.", "Yes."]
    assert [q.images for q in (first, second, third)] == [["a"], ["a", "b", "c"], ["a", "b", "c"]]
    assert [q.messages for q in (first, second, third)] == [dialogue[:2], dialogue[:4], dialogue[:6]]
    assert {(q.task, q.where, q.sample) for q in (first, second, third)} == {("compare", "row 3", 0)}
    assert (last.sample, last.task, last.images) == (1, "all", ["d"])


def test_an_answer_without_loss_is_not_asked_for_but_stays_in_the_next_prompt():
    dialogue = [user("A?"), assistant("Wrong.") | {"loss": False}, user("B?"), assistant("Right.")]
    (only,) = questions_of([Sample(dialogue, [], "", "row 0")])
    assert only.answer == "Right." and only.messages == dialogue[:3]


def test_questions_about_other_images_are_the_same_questions():
    samples = [sample("a", question="1?"), sample("b", question="2?"), sample("c", "d"), sample("e", "f")]
    for before, after in zip(questions_of(samples), questions_of(with_other_images(samples)), strict=True):
        assert (before.messages, before.answer, before.sample) == (after.messages, after.answer, after.sample)
        assert before.images != after.images and len(before.images) == len(after.images)
