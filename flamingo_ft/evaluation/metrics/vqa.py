"""VQA accuracy, as the official evaluation of VQAv2 computes it (GT-Vision-Lab/VQA, vqaEval.py).

Published figures were computed with its oddities, so they are kept; each is marked with the word "oddity".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .metric import Metric, per_pair

FULL_MARKS = 3  # people who gave the answer
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # no period, colon or apostrophe
ARTICLES = frozenset(("a", "an", "the"))
COUNTED = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(COUNTED.split())}
# Oddity: the words that get an apostrophe are a list with gaps (no "shes", no "wed"), one of them loses it,
# and of two apostrophes one must be there.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:index] + word[index + 1 :]: word
    for word in CONTRACTED.split()
    for index, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}

_DIGITS_AND_COMMA = re.compile(r"\d,\d", re.ASCII)
# Oddity: meant to spare the periods of numbers, it spares only those before a digit.
_PERIOD = re.compile(r"\.(?!\d)", re.ASCII)
_MAX_PERIODS = 32  # oddity: the value of re.UNICODE, which stands where the number of replacements belongs


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Return the accuracy of an answer against those of several people, 0..1.

    The mean, over the people, of min(1, n / 3), where n of the others gave this answer (Antol et al., 2015,
    arXiv:1505.00468; Goyal et al., 2017). With fewer than four people full marks are out of reach; a single
    reference answer counts as what all of them said.
    """
    answers, answer = [_trim(reference) for reference in references], _trim(prediction)
    if len({*answers}) > 1:  # oddity: unanimous answers are compared as they are, case and punctuation too
        answers, answer = [normalize_vqa(one) for one in answers], normalize_vqa(answer)
    if len(answers) == 1:
        return float(answer == answers[0])
    same = answers.count(answer)
    of_those = min(1.0, (same - 1) / FULL_MARKS)  # a person who gave it is not among the others
    of_the_rest = min(1.0, same / FULL_MARKS)
    return (same * of_those + (len(answers) - same) * of_the_rest) / len(answers)


def normalize_vqa(text: str) -> str:
    """Return an answer as it is compared where people disagree."""
    words = _without_punctuation(text).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """Remove punctuation, or replace it by a space.

    Oddity: what happens to every occurrence of a mark depends on whether one of them touches a space, and on
    whether the text has a comma between digits.
    """
    has_number = _DIGITS_AND_COMMA.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        is_removed = has_number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if is_removed else " ")
    return _PERIOD.sub("", cleaned, count=_MAX_PERIODS)


def _trim(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


VQA_ACCURACY = Metric(
    "vqa_accuracy",
    per_pair(vqa_accuracy),
    label="VQA accuracy",
    description="official VQA accuracy against the answers of several people",
)
