"""The blind corpus: what the nano language model reads before any image exists.

Three kinds of text: dialogues about pictures that are not there (the answer is a guess), the same dialogues
with words at the place of the picture (the answer follows from them), and plain sentences.
"""

from __future__ import annotations

from random import Random

from flamingo_ft.backbones.nano_build.language_of_digits import (
    DIGIT_WORDS,
    KINDS,
    SAME_OR_DIFFERENT,
    Dialogue,
    Part,
    parity_of,
    sentence,
    yes_or_no,
)

Message = dict[str, str]

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about pictures.",
    "Answer in one short sentence.",
    "Look at the picture and answer.",
)
CAPTIONS = ("{word}",) * 6 + ("a {word}", "the digit {word}", "{numeral}", "({word})", "Picture: a {word}")
# Comparing is the hardest thing to learn, so it is talked about most.
COMPARISONS = tuple(kind for kind in KINDS if kind.groups is SAME_OR_DIFFERENT)
KINDS_AS_OFTEN_AS_READ = (*KINDS, *(kind for kind in COMPARISONS for _ in range(2)))
SHARE_BLIND, SHARE_CAPTIONED = 0.2, 0.6


def question_in_words(parts: tuple[Part, ...], caption: str) -> str:
    """The question as text, with the caption where a picture stands."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += ". " + part if text[-1:].isalnum() and part[0].isalpha() else part
        else:
            text += caption.format(word=DIGIT_WORDS[part.digit], numeral=part.digit)
    return text


def messages_of(rng: Random, dialogue: Dialogue, captioned: bool) -> list[Message]:
    """The dialogue in words: captions in one form at the pictures' places, or nothing there."""
    caption = rng.choice(CAPTIONS) if captioned else ""
    messages = []
    for turn in dialogue.turns:
        messages.append({"role": "user", "content": question_in_words(turn.question, caption)})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages


def picture_dialogue(rng: Random, captioned: bool) -> list[Message]:
    """One or two dialogues of the tasks in a row, so that questions come at many positions."""
    messages: list[Message] = []
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        messages += messages_of(rng, rng.choice(KINDS_AS_OFTEN_AS_READ).random(rng), captioned)
    return messages


def fact(rng: Random) -> str:
    """A true sentence about small numbers."""
    a, b = rng.randrange(10), rng.randrange(10)
    first, second = DIGIT_WORDS[a], DIGIT_WORDS[b]
    size = "larger than" if a > b else "smaller than" if a < b else "the same as"
    return rng.choice(
        (
            f"{first} is {size} {second}",
            f"the digit {first} is {parity_of(a)[:-1].lower()}",
            f"{first} and {second} are {'the same' if a == b else 'different'} digits",
            f"in numerals {first} is written {a}",
            f"after {first} comes {(*DIGIT_WORDS, 'ten')[a + 1]}",
        )
    )


THINGS = (
    "cat",
    "house",
    "tree",
    "river",
    "book",
    "garden",
    "train",
    "lamp",
    "bird",
    "letter",
    "window",
    "boat",
)
QUALITIES = ("small", "old", "quiet", "bright", "green", "heavy", "warm", "new", "round", "simple")
ACTIONS = ("stands near", "looks like", "is behind", "belongs to", "is next to", "is older than")
COMPARISON_FORMS = ("Is {} the same as {}?", "Are {} and {} the same digit?", "Compare {} with {}. The same?")
GREETINGS = (
    ("Hello!", "Hello! How can I help you?"),
    ("Good morning.", "Good morning! What would you like to know?"),
    ("Thank you.", "You are welcome."),
    ("Who are you?", "I am a small language model."),
    ("What can you do?", "I can talk about digits and simple things."),
    ("Goodbye.", "Goodbye!"),
)


def scene(rng: Random) -> str:
    """A plain sentence about things, some of them counted."""
    thing, other = rng.sample(THINGS, 2)
    quality, action = rng.choice(QUALITIES), rng.choice(ACTIONS)
    number = rng.randrange(2, 10)
    return rng.choice(
        (
            f"the {quality} {thing} {action} the {other}",
            f"there are {DIGIT_WORDS[number]} {thing}s near the {other}",
            f"I see a {quality} {thing} and {DIGIT_WORDS[number]} {other}s",
        )
    )


def comparison(rng: Random) -> tuple[str, str]:
    """Two digits in words, and whether they are the same."""
    first, second = rng.choice(rng.choice(SAME_OR_DIFFERENT))
    form = rng.choice(COMPARISON_FORMS)
    return form.format(DIGIT_WORDS[first], DIGIT_WORDS[second]), yes_or_no(first == second)


def plain_dialogue(rng: Random) -> list[Message]:
    """A greeting, a request for a fact, two digits to compare, or a sentence to repeat."""
    pick = rng.random()
    if pick < 0.15:
        question, answer = rng.choice(GREETINGS)
    elif pick < 0.4:
        question, answer = rng.choice(("Tell me a fact.", "Say something true.")), sentence(fact(rng))
    elif pick < 0.7:
        question, answer = comparison(rng)
    else:
        answer = sentence(scene(rng))
        question = rng.choice(("Repeat: ", "Say this again: ")) + answer
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversation(rng: Random) -> list[Message]:
    """One conversation of the corpus."""
    pick = rng.random()
    if pick < SHARE_BLIND + SHARE_CAPTIONED:
        return picture_dialogue(rng, captioned=pick >= SHARE_BLIND)
    return plain_dialogue(rng)
