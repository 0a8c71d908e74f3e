"""Muon for the matrices of a bridge and AdamW for everything else, as one optimizer.

The Muon of torch and of timm always orthogonalize in bf16, which a CPU without bf16 instructions computes 20
to 50 times slower than float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration's quintic polynomial
RATE_FACTOR = 4  # in single runs of a new bridge, 2 to 8 were about as good and 1 was not
MAX_STACKED = 1 << 24  # elements of matrices that are orthogonalized together: 64 MiB in float32
ADAMW_RMS = 0.2  # about the root mean square of AdamW's updates, relative to the learning rate


class Muon(torch.optim.Optimizer):
    """Updates matrices by their orthogonalized momentum, and other parameters by AdamW.

    The update of a matrix (M, N) is scaled by 0.2 sqrt(max(M, N)), so that it has about the size of AdamW's
    with the same learning rate. The matrices' learning rate is `RATE_FACTOR` times that of their group.
    Sources: Muon, Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with Nesterov momentum; the scale,
    arXiv:2502.16982, equation 4.

    groups: parameter groups, each with ``orthogonalized``, whether Muon updates it.
    dtype: that the orthogonalization is computed in.
    adamw: options of `torch.optim.AdamW`.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **adamw: Any):
        self._adamw = torch.optim.AdamW(groups, **adamw)
        super().__init__(groups, defaults=self._adamw.defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        """Update every parameter that has a gradient."""
        self._adamw.state = self.state  # both may have been replaced by those of a checkpoint
        self._adamw.param_groups = [group for group in self.param_groups if not group["orthogonalized"]]
        self._adamw.step()
        for group in self.param_groups:
            if group["orthogonalized"]:
                updated = [parameter for parameter in group["params"] if parameter.grad is not None]
                for stack in _stacks(updated):
                    self._update_matrices(stack, RATE_FACTOR * group["lr"], group["weight_decay"])

    def _update_matrices(self, parameters: list[Tensor], rate: float, weight_decay: float) -> None:
        """Update parameters of one shape."""
        directions = orthogonalize(torch.stack([self._nesterov(one) for one in parameters]), self.dtype)
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.mul_(1 - rate * weight_decay)
            parameter.add_(direction, alpha=-rate * ADAMW_RMS * max(parameter.shape) ** 0.5)

    def _nesterov(self, parameter: Tensor) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)


def _stacks(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield parameters of one shape together, of `MAX_STACKED` elements at most if there are several."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
    for shape, alike in by_shape.items():
        count = max(1, MAX_STACKED // shape.numel())
        yield from (alike[start : start + count] for start in range(0, len(alike), count))


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about the nearest orthogonal matrices: large singular values end between 0.7 and 1.2.

    Newton-Schulz iteration with the coefficients of Jordan et al., computed in ``dtype``. matrices (N, R, C):
    the products of several small matrices at once take less than half the time of one after the other.
    """
    linear, cubic, quintic = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        x = torch.baddbmm(x, polynomial, x, beta=linear)
    return x.mT if is_tall else x
