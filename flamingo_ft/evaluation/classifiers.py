"""Small classifiers on fixed features, for the probe: nearest neighbour, logistic regression, attention.

Shapes: N samples, V tokens, D width, K classes, P principal components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

ITERATIONS = 300  # of L-BFGS, at most
TOLERANCE = 1e-7  # on its largest gradient, of a loss averaged over the samples
KEY_WIDTH = 64  # P
ATTENTION_STEPS, ATTENTION_RATE = 60, 0.05  # of Adam
PCA_TOKENS = 16_384  # evenly spaced among all tokens: enough for their covariance
ROWS_AT_ONCE = 2**13  # of float32, while bfloat16 tokens are read


@dataclass(frozen=True)
class Standardizer:
    """Shifts and scales channels to mean 0 and variance 1 over the samples that it was fitted on.

    mean, scale: (D,). The scale of a constant channel is 1, as in scikit-learn's StandardScaler.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> Standardizer:
        """Fit on features (..., D); sums of some rows at a time are added in double precision."""
        rows = features.reshape(-1, features.shape[-1])
        total = squares = torch.zeros(rows.shape[1], dtype=torch.float64)
        for chunk in rows.split(ROWS_AT_ONCE):
            total = total + chunk.float().sum(0).double()
        mean = total / len(rows)
        for chunk in rows.split(ROWS_AT_ONCE):
            squares = squares + (chunk.float() - mean.float()).square().sum(0).double()
        scale = (squares / len(rows)).sqrt()
        constant = scale <= 10 * torch.finfo(torch.float32).eps * mean.abs()
        return cls(mean, torch.where(constant, 1.0, scale))

    def __call__(self, features: Tensor) -> Tensor:
        """Return standardized features (..., D), in float32."""
        return (features.float() - self.mean.float()) / self.scale.float()


def nearest_neighbour(pool: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Return the label of the sample of ``pool`` (N, D) with the largest cosine similarity to each query.

    Equals scikit-learn's ``KNeighborsClassifier(n_neighbors=1, metric="cosine")``. labels: (N,).
    """
    similarity = functional.normalize(queries, dim=-1) @ functional.normalize(pool, dim=-1).T
    return labels[similarity.argmax(1)]


@dataclass(frozen=True)
class LogisticRegression:
    """Multinomial logistic regression. weight: (K, D), or (1, D) with two classes; bias: (K,) or (1,)."""

    weight: Tensor
    bias: Tensor

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the probability of each class, (N, K)."""
        return _logits(self.weight, self.bias, features.to(self.weight.dtype)).softmax(1)

    def predict(self, features: Tensor) -> Tensor:
        """Return the most probable class of each sample, (N,)."""
        return self.probabilities(features).argmax(1)


def fit_logistic_regression(
    features: Tensor, labels: Tensor, classes: int, c: float = 1.0
) -> LogisticRegression:
    """Fit by L-BFGS, in double precision and from zero, so that the result is deterministic.

    Minimizes ``c * sum of cross-entropies + |weight|^2 / 2``, the objective of scikit-learn's
    ``LogisticRegression(C=c)``: the bias is not regularized, and two classes share one row of weights.

    Args:
        features: (N, D), standardized. labels: (N,), from 0 to ``classes`` - 1.
    """
    features = features.double()
    rows = 1 if classes == 2 else classes
    weight = torch.zeros(rows, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(rows, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        fit = functional.cross_entropy(_logits(weight, bias, features), labels)
        return fit + weight.square().sum() / (2 * c * len(labels))

    _minimize(loss, [weight, bias])
    return LogisticRegression(weight.detach(), bias.detach())


def _logits(weight: Tensor, bias: Tensor, features: Tensor) -> Tensor:
    """Return logits (N, K); with two classes, those of the first are 0."""
    logits = features @ weight.T + bias
    return functional.pad(logits, (1, 0)) if len(weight) == 1 else logits


def _minimize(loss_fn: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)


# --- attention


@dataclass(frozen=True)
class AttentionPooling:
    """Averages tokens with weights from one learned query.

    standardize: of tokens; query: (D,), which takes standardized tokens.
    """

    standardize: Standardizer
    query: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the attended standardized tokens (N, D) of tokens (N, V, D)."""
        query = self.query / self.standardize.scale.float()  # the mean's share is the same for all tokens
        pooled = []
        for chunk in _chunks(tokens):
            weights = (chunk @ query).softmax(1)
            pooled.append(torch.einsum("nv,nvd->nd", weights, chunk))
        return self.standardize(torch.cat(pooled))


def fit_attention_pooling(tokens: Tensor, labels: Tensor, classes: int, groups: int = 1) -> AttentionPooling:
    """Learn the query together with a linear head, by Adam, full batch and from mean pooling: deterministic.

    Both see the tokens' first P = 64 principal components, which keeps a step to milliseconds. The head is
    discarded: fit another one on the attended tokens in full width.

    Args:
        tokens: (N * groups, V, D); a sample with several images has one row of tokens for each, in order.
        labels: (N,).
    """
    standardize = Standardizer.fit(tokens)
    components = _principal_components(tokens, standardize)
    keys = torch.cat([standardize(chunk) @ components for chunk in _chunks(tokens)])
    scale = keys.std().clamp_min(1e-6)
    keys /= scale
    query = torch.zeros(keys.shape[-1], requires_grad=True)
    weight = torch.zeros(classes, groups * keys.shape[-1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.Adam([query, weight, bias], lr=ATTENTION_RATE)
    with torch.enable_grad():
        for _ in range(ATTENTION_STEPS):
            weights = (keys @ query).softmax(1)
            attended = (weights.unsqueeze(1) @ keys).reshape(len(labels), -1)
            penalty = weight.square().sum() / (2 * len(labels))
            optimizer.zero_grad()
            (functional.cross_entropy(attended @ weight.T + bias, labels) + penalty).backward()
            optimizer.step()
    return AttentionPooling(standardize, components @ query.detach() / scale)


def _principal_components(tokens: Tensor, standardize: Standardizer) -> Tensor:
    """Return the directions of the largest variance of the tokens, (D, P)."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    rows = standardize(rows[:: -(-len(rows) // PCA_TOKENS)])
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    return vectors[:, -min(KEY_WIDTH, rows.shape[1]) :].flip(1)


def _chunks(tokens: Tensor) -> Iterator[Tensor]:
    """Yield tokens (N, V, D) some samples at a time, in float32."""
    for chunk in tokens.split(max(1, ROWS_AT_ONCE // tokens.shape[1])):
        yield chunk.float()
