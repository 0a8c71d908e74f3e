"""Questions about pictures of digits, and their right answers: the one place for every task's wording.

A question is a tuple of parts: text, or a `Picture` in place of an image. The quickstart data puts real
images there; the text-only corpus of the nano language model puts words there, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Picture:
    """Placeholder for an image of `digit` in a question."""

    digit: int


Part = str | Picture


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: tuple[Part, ...]
    answer: str


@dataclass(frozen=True)
class Dialogue:
    """Turns of a conversation; `task` names it in the data."""

    task: str
    turns: tuple[Turn, ...]

    @property
    def pictures(self) -> list[Picture]:
        """The pictures of all turns, in order."""
        return [part for turn in self.turns for part in turn.question if isinstance(part, Picture)]


WHICH_DIGIT = (
    "Which digit is this?",
    "What digit is this?",
    "Which digit do you see?",
    "Which number is written here?",
    "Read this digit.",
    "Name the digit.",
)
EVEN_OR_ODD = (
    "Is this digit even or odd?",
    "Is it even or odd?",
    "Is this an even or an odd number?",
    "Even or odd?",
)
LARGER_THAN_FIVE = (
    "Is this digit larger than five?",
    "Is it larger than five?",
    "Is this number greater than five?",
    "Is it more than five?",
)
NAME_BOTH = (
    "Name both digits in order.",
    "Which two digits are these?",
    "Which digits do you see, in order?",
    "Read both digits.",
)
SAME_DIGIT = (
    "Are they the same digit?",
    "Are these the same digit?",
    "Do both show the same digit?",
    "Is it the same digit twice?",
)
WHICH_DIGIT_NEXT = (
    "And which digit is this?",
    "And this one?",
    "Which digit is this one?",
    "And what is this?",
)
WHICH_DIGIT_AGAIN = ("And which digit is it?", "Which digit is it?", "So which digit is it?")
SAME_AS_BEFORE = (
    "Is this the same digit?",
    "Is this the same digit as before?",
    "Is it the same digit again?",
)

PAIR_LAYOUTS = (
    ("Image one: ", " image two: ", " "),
    ("First image: ", " Second image: ", " "),
    ("Here is ", " and here is ", ". "),
    ("", " and ", " "),
)


def sentence(words: str) -> str:
    """Return the words as a sentence: "seven" becomes "Seven."."""
    return words[0].upper() + words[1:] + "."


def name_answer(digit: int) -> str:
    return sentence(DIGIT_WORDS[digit])


def parity_answer(digit: int) -> str:
    return "Odd." if digit % 2 else "Even."


def yes_or_no(is_so: bool) -> str:
    return "Yes." if is_so else "No."


def about_one(rng: Random, digit: int, questions: tuple[str, ...]) -> tuple[Part, ...]:
    """Return a question about one picture, which mostly comes first and sometimes last."""
    question = rng.choice(questions)
    if rng.random() < 0.2:
        return (question + " ", Picture(digit))
    return (Picture(digit), question)


def about_two(rng: Random, first: int, second: int, questions: tuple[str, ...]) -> tuple[Part, ...]:
    """Return a question about two pictures within the text."""
    before, between, after = rng.choice(PAIR_LAYOUTS)
    parts = (before, Picture(first), between, Picture(second), after + rng.choice(questions))
    return tuple(part for part in parts if part)


def which_digit(rng: Random, digit: int) -> Dialogue:
    return Dialogue("which_digit", (Turn(about_one(rng, digit, WHICH_DIGIT), name_answer(digit)),))


def even_or_odd(rng: Random, digit: int) -> Dialogue:
    return Dialogue("even_or_odd", (Turn(about_one(rng, digit, EVEN_OR_ODD), parity_answer(digit)),))


def larger_than_five(rng: Random, digit: int) -> Dialogue:
    answer = yes_or_no(digit > 5)
    return Dialogue("larger_than_five", (Turn(about_one(rng, digit, LARGER_THAN_FIVE), answer),))


def name_both(rng: Random, first: int, second: int) -> Dialogue:
    answer = sentence(f"{DIGIT_WORDS[first]} and {DIGIT_WORDS[second]}")
    return Dialogue("name_both", (Turn(about_two(rng, first, second, NAME_BOTH), answer),))


def same_digit(rng: Random, first: int, second: int) -> Dialogue:
    answer = yes_or_no(first == second)
    return Dialogue("same_digit", (Turn(about_two(rng, first, second, SAME_DIGIT), answer),))


def parity_then_name(rng: Random, digit: int) -> Dialogue:
    """Two turns about one picture; the first answer leaves five digits for the second."""
    first = Turn(about_one(rng, digit, EVEN_OR_ODD), parity_answer(digit))
    return Dialogue("dialogue", (first, Turn((rng.choice(WHICH_DIGIT_AGAIN),), name_answer(digit))))


def larger_then_parity(rng: Random, digit: int) -> Dialogue:
    """Two turns about one picture; the first answer says nothing about the second."""
    first = Turn(about_one(rng, digit, LARGER_THAN_FIVE), yes_or_no(digit > 5))
    return Dialogue("dialogue", (first, Turn((rng.choice(EVEN_OR_ODD),), parity_answer(digit))))


def name_then_next(rng: Random, first: int, second: int) -> Dialogue:
    """The second turn brings a second picture and asks for its name."""
    opening = Turn(about_one(rng, first, WHICH_DIGIT), name_answer(first))
    return Dialogue(
        "dialogue", (opening, Turn((Picture(second), rng.choice(WHICH_DIGIT_NEXT)), name_answer(second)))
    )


def name_then_compare(rng: Random, first: int, second: int) -> Dialogue:
    """The second turn brings a second picture and compares it with the first."""
    opening = Turn(about_one(rng, first, WHICH_DIGIT), name_answer(first))
    question = (Picture(second), rng.choice(SAME_AS_BEFORE))
    return Dialogue("dialogue", (opening, Turn(question, yes_or_no(first == second))))


Digits = tuple[int, ...]  # of the pictures of one dialogue

EVERY_DIGIT = (tuple((digit,) for digit in range(10)),)
UP_TO_FIVE_OR_LARGER = (tuple((digit,) for digit in range(6)), tuple((digit,) for digit in range(6, 10)))
EVERY_PAIR = (tuple((first, second) for first in range(10) for second in range(10)),)
SAME_OR_DIFFERENT = (
    tuple((digit, digit) for digit in range(10)),
    tuple((first, second) for first in range(10) for second in range(10) if first != second),
)


@dataclass(frozen=True)
class Kind:
    """One kind of dialogue.

    make: writes it for given digits. groups: the digits it is asked about; groups are equally frequent, and
        so are the entries of a group, so that answers are balanced.
    chance: accuracy of the best guess at the last answer without seeing the pictures, given the turns before.
    """

    make: Callable[..., Dialogue]
    groups: tuple[tuple[Digits, ...], ...]
    chance: float

    def random(self, rng: Random) -> Dialogue:
        """Return a random dialogue of this kind."""
        return self.make(rng, *rng.choice(rng.choice(self.groups)))

    def balanced(self, rng: Random, count: int) -> list[Dialogue]:
        """Return `count` dialogues that cycle through the groups; each group is reshuffled every time."""
        decks = [endless(rng, group) for group in self.groups]
        return [self.make(rng, *next(decks[i % len(decks)])) for i in range(count)]


def endless(rng: Random, items: Sequence[T]) -> Iterator[T]:
    """Yield the items in random order without end, each once per round."""
    while True:
        yield from rng.sample(items, len(items))


KINDS = (
    Kind(which_digit, EVERY_DIGIT, 0.1),
    Kind(even_or_odd, EVERY_DIGIT, 0.5),
    Kind(larger_than_five, UP_TO_FIVE_OR_LARGER, 0.5),
    Kind(name_both, EVERY_PAIR, 0.01),
    Kind(same_digit, SAME_OR_DIFFERENT, 0.5),
    Kind(parity_then_name, EVERY_DIGIT, 0.2),
    Kind(larger_then_parity, UP_TO_FIVE_OR_LARGER, 0.5),
    Kind(name_then_next, EVERY_PAIR, 0.1),
    Kind(name_then_compare, SAME_OR_DIFFERENT, 0.5),
)
