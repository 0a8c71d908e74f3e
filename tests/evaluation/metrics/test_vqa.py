"""VQA accuracy is that of the official evaluation, its oddities included; ANLS forgives small misreadings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_ft.evaluation.metrics import METRICS
from flamingo_ft.evaluation.metrics.anls import anls
from flamingo_ft.evaluation.metrics.vqa import CONTRACTIONS, normalize_vqa, vqa_accuracy

# Derived by hand from the official evaluation's steps: punctuation, then lower case, numbers, articles and
# contractions; see vqa.py for what is odd about them.
NORMALIZED = {
    # punctuation
    "a comma between words becomes a space": ("red,white", "red white"),
    "a comma before a space is removed": ("red, white", "red white"),
    "a comma between digits is removed": ("1,000", "1000"),
    "and with it every other mark, also between words": ("1,000 red-white", "1000 redwhite"),
    "a hyphen between words becomes a space": ("t-shirt", "t shirt"),
    "a hyphen at a space is removed, and with it all hyphens": ("t-shirt -", "tshirt"),
    "each mark is treated by itself": ("a-b c/ d", "b c d"),
    "a mark at the end of the text becomes a space": ("what?", "what"),
    "slash, at sign, brackets": ("b/w @home (x)", "b w home x"),
    "colon, apostrophe, dollar and percent stay": ("5:30 $5 5% dog's", "5:30 $5 5% dog's"),
    "a period is removed": ("yes.", "yes"),
    "also behind a digit, which was not meant": ("5.", "5"),
    "a period before a digit stays": ("2.5", "2.5"),
    "also behind a letter": ("v.2", "v.2"),
    "periods of an abbreviation are removed": ("U.S.A.", "usa"),
    "only the first 32 periods are removed": ("." * 34 + "x", "..x"),
    # digits and articles
    "number words become digits": ("Two dogs and ten cats", "2 dogs and 10 cats"),
    "none is 0": ("none", "0"),
    "eleven is not": ("eleven", "eleven"),
    "articles are removed": ("the cat on a mat an", "cat on mat"),
    "an article alone leaves nothing": ("A", ""),
    "spaces are joined": ("  red \t  white ", "red white"),
    # contractions
    "a missing apostrophe is put in": ("dont", "don't"),
    "one of two apostrophes is put in": (
        "couldntve couldnt've couldn'tve",
        "couldntve couldn't've couldn't've",
    ),
    "an apostrophe in front": ("twas", "'twas"),
    "some contractions are not in the list": ("shes well shell", "shes well shell"),
    "one loses its apostrophe": ("somebody'd", "somebodyd"),
    "upper case is lower case by then": ("Im Ive", "im ive"),
    "a contraction right before a mark": ("dont!", "don't"),
}


@pytest.mark.parametrize(("text", "expected"), NORMALIZED.values(), ids=NORMALIZED)
def test_an_answer_is_normalized_as_officially(text, expected):
    assert normalize_vqa(text) == expected


def test_the_list_of_contractions_is_complete():
    assert len(CONTRACTIONS) == 114 and CONTRACTIONS["y'alld've"] == "y'all'd've"


TEN = ["yes"] * 4 + ["no"] * 3 + ["maybe"] * 2 + ["Yes."]
ACCURACIES = {
    "three others said so": ("yes", TEN, 1.0),  # 5 people: each of them has 4 others
    "of three, each has two others": ("no", TEN, (3 * 2 / 3 + 7 * 1) / 10),
    "of two, each has one other": ("maybe", TEN, (2 * 1 / 3 + 8 * 2 / 3) / 10),
    "one person": ("x", ["x"] + ["y"] * 9, (0 + 9 * 1 / 3) / 10),
    "nobody": ("z", TEN, 0.0),
    "an article is removed where people disagree": ("the no", TEN, 0.9),
    "case and period count where people agree": ("Yes.", ["yes"] * 10, 0.0),
    "and so does an article": ("a dog", ["dog"] * 10, 0.0),
    "spaces around do not": (" yes\n", ["yes"] * 10, 1.0),
    "agreement is judged before normalization": ("YES!", ["yes"] * 9 + ["yes."], 1.0),
    "two people": ("a1", ["a1", "b1"], (0 + 1 / 3) / 2),
    "a single reference answer stands for all people": ("dog", ["dog"], 1.0),
    "and is compared as it is": ("Dog", ["dog"], 0.0),
}


@pytest.mark.parametrize(("answer", "people", "expected"), ACCURACIES.values(), ids=ACCURACIES)
def test_an_answer_has_the_official_accuracy(answer, people, expected):
    assert vqa_accuracy(answer, people) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["yes", "no", "Two", "2", "a dog", "dog."]), min_size=2, max_size=10))
def test_accuracy_is_the_mean_over_the_people_of_what_the_others_said(people):
    for answer in people:
        same = (lambda one: one) if len({*people}) == 1 else normalize_vqa
        marks = [
            min(1, sum(same(other) == same(answer) for other in people[:i] + people[i + 1 :]) / 3)
            for i in range(len(people))
        ]
        assert vqa_accuracy(answer, people) == pytest.approx(sum(marks) / len(marks))


# --- ANLS ---

SIMILARITIES = {
    "equal": ("Stop", ["stop"], 1.0),
    "one of four letters": ("stap", ["stop"], 0.75),  # NL = 1/4
    "one letter too many": ("stopp", ["stop"], 0.8),  # NL = 1/5
    "half of the letters": ("stxx", ["stop"], 0.0),  # NL = 1/2 is not below the threshold
    "just below half": ("stoxx", ["stopq"], 0.6),  # NL = 2/5
    "the nearest reference counts": ("stap", ["go", "stop", "step"], 0.75),
    "spaces are joined": (" no  entry ", ["No Entry"], 1.0),
    "nothing": ("", ["stop"], 0.0),
    "much too long": ("stop here and wait", ["stop"], 0.0),
}


@pytest.mark.parametrize(("answer", "references", "expected"), SIMILARITIES.values(), ids=SIMILARITIES)
def test_anls_is_the_similarity_above_the_threshold(answer, references, expected):
    assert anls(answer, references) == pytest.approx(expected)


def test_both_are_registered_as_means():
    assert METRICS["anls"].statistics(["stap", "x"], [["stop"], ["stop"]]).mean() == 0.375
    assert METRICS["vqa_accuracy"].statistics(["yes"], [["yes"] * 10]).tolist() == [1.0]
