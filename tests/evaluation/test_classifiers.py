"""The probe's classifiers equal scikit-learn's, find what is there, and find nothing in noise."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from flamingo_ft.evaluation.classifiers import (
    Standardizer,
    fit_attention_pooling,
    fit_logistic_regression,
    nearest_neighbour,
)
from tests.thinned import slow


def clusters(classes: int, width: int, spread: float, samples: int = 120, seed: int = 0):
    """Features (N, D) around a centre per class, unbalanced and in very different units, and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.multinomial(torch.arange(1.0, classes + 1), samples, True, generator=generator)
    features = centres[labels] + spread * torch.randn(samples, width, generator=generator)
    return features * torch.logspace(-2, 3, width) + 5, labels


@pytest.fixture(params=[(2, 6, 2.0), slow((2, 200, 6.0)), (4, 30, 2.0), slow((7, 300, 5.0))], ids=str)
def split(request):
    """Standardized features and labels to fit on and to test on, and the number of classes."""
    classes, width, spread = request.param
    train, labels = clusters(classes, width, spread)
    evaluation, targets = clusters(classes, width, spread, seed=1)
    standardize = Standardizer.fit(train)
    return standardize(train), labels, standardize(evaluation), targets, classes


def test_standardizing_equals_scikit_learn_also_for_a_constant_channel():
    features, _ = clusters(3, 8, 1.0)
    features[:, 2] = 0.1
    expected = StandardScaler().fit(features.double())
    ours = Standardizer.fit(features)
    torch.testing.assert_close(
        ours(features).double(), torch.from_numpy(expected.transform(features.double())), atol=1e-4, rtol=1e-4
    )


def test_the_linear_probe_equals_scikit_learn_s_logistic_regression(split):
    train, labels, evaluation, targets, classes = split
    reference = LogisticRegression(C=1.0, max_iter=2000, tol=1e-8).fit(train.double(), labels)
    model = fit_logistic_regression(train, labels, classes)
    expected = torch.from_numpy(reference.predict_proba(evaluation.double()))
    torch.testing.assert_close(model.probabilities(evaluation), expected, atol=1e-3, rtol=0)
    accuracy = (model.predict(evaluation) == targets).double().mean().item()
    assert accuracy == pytest.approx(reference.score(evaluation.double(), targets), abs=1e-9)
    assert 1 / classes < accuracy < 1, "a case that is neither chance nor trivial"


def test_the_nearest_neighbour_equals_scikit_learn_s(split):
    train, labels, evaluation, _, _ = split
    reference = KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(train, labels)
    assert nearest_neighbour(train, labels, evaluation).tolist() == reference.predict(evaluation).tolist()


def test_fitting_twice_gives_the_same_bits(split):
    train, labels, evaluation, _, classes = split
    first, second = (
        fit_logistic_regression(train, labels, classes).probabilities(evaluation) for _ in range(2)
    )
    assert torch.equal(first, second)


# --- attention


def one_telling_token(samples: int, seed: int, tokens: int = 16, width: int = 24):
    """Tokens (N, V, D) of noise; one at a random place has a mark and, in other channels, the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    features = torch.randn(samples, tokens, width, generator=generator)
    place = torch.randint(tokens, (samples,), generator=generator)
    features[torch.arange(samples), place, 0] += 8
    features[torch.arange(samples), place, 1 + labels] += 4
    return features, labels


def accuracy(train, labels, evaluation, targets) -> float:
    standardize = Standardizer.fit(train)
    model = fit_logistic_regression(standardize(train), labels, 3)
    return (model.predict(standardize(evaluation)) == targets).double().mean().item()


def test_attention_finds_the_one_telling_token_that_averaging_drowns():
    (train, labels), (evaluation, targets) = one_telling_token(300, 0), one_telling_token(200, 1)
    pooling = fit_attention_pooling(train, labels, 3)
    pooled = accuracy(train.mean(1), labels, evaluation.mean(1), targets)
    attended = accuracy(pooling(train), labels, pooling(evaluation), targets)
    assert attended > 0.95 > 0.8 > pooled


def test_attention_before_any_step_is_mean_pooling(monkeypatch):
    monkeypatch.setattr("flamingo_ft.evaluation.classifiers.ATTENTION_STEPS", 0)
    train, labels = one_telling_token(50, 0)
    pooling = fit_attention_pooling(train, labels, 3)
    torch.testing.assert_close(pooling(train), pooling.standardize(train).mean(1), atol=1e-5, rtol=1e-5)


def test_attention_is_fitted_deterministically_and_with_several_images_per_sample():
    (train, labels), query = one_telling_token(120, 0), []
    for _ in range(2):
        query.append(fit_attention_pooling(train, labels[::2], 3, groups=2).query)
    assert torch.equal(*query) and query[0].any()
