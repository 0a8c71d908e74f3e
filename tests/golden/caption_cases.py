"""Generated captions with their references, as tokens; the same on every machine."""

from __future__ import annotations

from tests.golden.deterministic_weights import hashed_words

PAIRS = 500
WORDS = "a the dog cat man child red blue small old runs sits eats on under near park sofa ball grass two"
RARE = 40  # words that few captions have
Captions = tuple[list[str], list[list[str]]]

# What generated captions may lack: nothing at all, one word, only words that no reference has, the reference
# itself, a word too often, references of different lengths, equally near ones, and the same one twice.
CORNERS: list[tuple[str, list[str]]] = [
    ("", ["a dog", "the cat sits"]),
    ("dog", ["dog", "a dog runs"]),
    ("", [""]),
    ("a dog", ["", "cat"]),
    ("zebra xylophone quartz", ["a dog runs on the grass"]),
    ("a dog runs on the grass", ["a dog runs on the grass"]),
    ("the the the the the the", ["the cat is on the mat", "there is a cat on the mat"]),
    ("a b c d", ["a b c", "a b c d e", "a"]),
    ("two dogs near the sofa", ["two dogs near the sofa", "two dogs near the sofa"]),
    ("a b a b a b a b", ["a b a b", "b a b a b a"]),
]


def caption_cases(name: str = "captions", pairs: int = PAIRS) -> Captions:
    """Return predictions, and one to six references of each, as texts of tokens between single spaces."""
    common = WORDS.split()
    words = iter(hashed_words(name, pairs * 400).tolist())

    def word() -> str:
        number = next(words)
        return f"rare{number // 7 % RARE}" if number % 7 == 0 else common[number // 7 % len(common)]

    def changed(tokens: list[str]) -> list[str]:
        """Return tokens with some left out and some replaced."""
        kept = [token for token in tokens if next(words) % 8]
        return [word() if next(words) % 4 == 0 else token for token in kept]

    predictions, references = [text for text, _ in CORNERS], [texts for _, texts in CORNERS]
    while len(predictions) < pairs:
        truth = [word() for _ in range(3 + next(words) % 12)]
        predictions.append(" ".join(changed(truth)))
        references.append([" ".join(changed(truth) or truth) for _ in range(1 + next(words) % 6)])
    return predictions, references
