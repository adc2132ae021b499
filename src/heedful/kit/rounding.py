"""Evenly spaced values that numbers are rounded to, and columns rounded one by one, each making up for the last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHRINKS = 80  # sizes of a step that are searched, each a hundredth smaller than the last
DAMPING = 0.01  # share of a Hessian's mean diagonal that is added to it, so that it has an inverse


@dataclass(frozen=True, eq=False)
class Rounding:
    """The values step * (code - zero) of whole codes from `low` to `high`; each row has its own step and zero."""

    step: Tensor  # [... o 1], above 0
    zero: Tensor  # [... o 1], a code
    low: int
    high: int

    @staticmethod
    def absmax(x: Tensor, bits: int) -> Rounding:
        """Of `x [... o i]`: each row's largest magnitude is the highest value, and zero a value."""
        top = 2 ** (bits - 1) - 1
        step = above_zero(x.abs().amax(-1, keepdim=True) / top)
        return Rounding(step, torch.zeros_like(step), -top - 1, top)

    @staticmethod
    def minmax(x: Tensor, bits: int) -> Rounding:
        """Of `x [... o i]`: from each row's lowest to its highest, zero among them."""
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        step = above_zero((high - low) / (2**bits - 1))
        return Rounding(step, (-low / step).round(), 0, 2**bits - 1)

    def codes(self, x: Tensor) -> Tensor:
        """The nearest codes, counted from that of zero."""
        return ((x / self.step).round() + self.zero).clamp(self.low, self.high) - self.zero

    def of(self, x: Tensor) -> Tensor:
        """The nearest values."""
        return self.step * self.codes(x)

    def searched(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Rounding:
        """The same with the step of each row, of those up to 80 % smaller, that makes `loss` of its errors least.

        What lies outside is cut off, which pays where few numbers are large. `loss` makes `[... o 1]` of `[... o i]`.
        """
        best, least = self.step, torch.full_like(self.step, torch.inf)
        for i in range(SHRINKS):
            smaller = replace(self, step=self.step * (1 - i / 100))
            found = loss(smaller.of(x) - x)
            best = torch.where(found < least, smaller.step, best)
            least = torch.minimum(found, least)
        return replace(self, step=best)


def above_zero(step: Tensor) -> Tensor:
    """Steps and scales; one of nothing but zeros may be any."""
    return step.masked_fill(step == 0, 1.0)


def damped(hessian: Tensor) -> Tensor:
    """`[... i i]` with 1 % of its mean diagonal on top; what no input reached counts by itself, as 1."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    diagonal = diagonal.masked_fill(diagonal == 0, 1.0)
    return hessian.diagonal_scatter(diagonal + DAMPING * diagonal.mean(-1, keepdim=True), dim1=-2, dim2=-1)


def inverse_root(hessian: Tensor) -> Tensor:
    """The upper triangular u of the inverse uᵀ u of a damped Hessian."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def compensated(x: Tensor, root: Tensor, grid: Rounding, drift: Tensor | None = None) -> Tensor:
    """Rows `x [... o i]` on a grid, column by column: what one loses, the columns after it make up for as they can.

    The loss is e H eᵀ of a row's error e; `root` is `inverse_root` of H. `drift [... i i]`, where the inputs are not
    those of before, is (D uᵀ above the diagonal) u, with D the product of what they lack and what they are.
    """
    rest, out = x.clone(), torch.empty_like(x)
    for i in range(x.shape[-1]):
        now = rest[..., i : i + 1].clone()
        out[..., i : i + 1] = grid.of(now)
        lost = (now - out[..., i : i + 1]) / root[..., i : i + 1, i : i + 1]
        change = lost * root[..., i : i + 1, i:]
        if drift is not None:
            change = change - now * drift[..., i : i + 1, i:]
        rest[..., i:] -= change
    return out
