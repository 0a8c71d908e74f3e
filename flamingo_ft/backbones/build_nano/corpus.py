"""The text-only corpus that the nano language model is trained on.

Three kinds of text: dialogues about pictures that are missing (answers are guesses), the same dialogues with
words in place of the pictures (answers follow from them), and plain sentences.
"""

from __future__ import annotations

from random import Random

from flamingo_ft.backbones.build_nano.digit_questions import (
    DIGIT_WORDS,
    KINDS,
    SAME_OR_DIFFERENT,
    Dialogue,
    Part,
    parity_answer,
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
# Comparing is the hardest to learn, so it is the most frequent.
COMPARISONS = tuple(kind for kind in KINDS if kind.groups is SAME_OR_DIFFERENT)
WEIGHTED_KINDS = (*KINDS, *(kind for kind in COMPARISONS for _ in range(2)))
BLIND_FRACTION, CAPTIONED_FRACTION = 0.2, 0.6  # the rest is plain dialogue


def question_in_words(parts: tuple[Part, ...], caption: str) -> str:
    """Return the question as text, with the caption in place of a picture."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += ". " + part if text[-1:].isalnum() and part[0].isalpha() else part
        else:
            text += caption.format(word=DIGIT_WORDS[part.digit], numeral=part.digit)
    return text


def dialogue_messages(rng: Random, dialogue: Dialogue, captioned: bool) -> list[Message]:
    """Return the dialogue as messages, with captions of one form or nothing in place of the pictures."""
    caption = rng.choice(CAPTIONS) if captioned else ""
    messages = []
    for turn in dialogue.turns:
        messages.append({"role": "user", "content": question_in_words(turn.question, caption)})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages


def picture_dialogue(rng: Random, captioned: bool) -> list[Message]:
    """Return one or two dialogues in a row, so that questions occur at many positions."""
    messages: list[Message] = []
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        messages += dialogue_messages(rng, rng.choice(WEIGHTED_KINDS).random(rng), captioned)
    return messages


def fact(rng: Random) -> str:
    """Return a true statement about small numbers."""
    a, b = rng.randrange(10), rng.randrange(10)
    first, second = DIGIT_WORDS[a], DIGIT_WORDS[b]
    size = "larger than" if a > b else "smaller than" if a < b else "the same as"
    return rng.choice(
        (
            f"{first} is {size} {second}",
            f"the digit {first} is {parity_answer(a)[:-1].lower()}",
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
    """Return a plain statement about things, some of them counted."""
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
    """Return a question about two digits in words, and whether they are the same."""
    first, second = rng.choice(rng.choice(SAME_OR_DIFFERENT))
    form = rng.choice(COMPARISON_FORMS)
    return form.format(DIGIT_WORDS[first], DIGIT_WORDS[second]), yes_or_no(first == second)


def plain_dialogue(rng: Random) -> list[Message]:
    """Return a greeting, a request for a fact, two digits to compare, or a sentence to repeat."""
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
    """Return one random conversation of the corpus."""
    pick = rng.random()
    if pick < BLIND_FRACTION + CAPTIONED_FRACTION:
        return picture_dialogue(rng, captioned=pick >= BLIND_FRACTION)
    return plain_dialogue(rng)
