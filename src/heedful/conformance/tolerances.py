"""Every tolerance in heedful. Nothing else compares numbers with a slack of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDINGS = 64.0  # float32 roundings between two orders of summation of one attention call, at most
DEPTH = 16.0  # how much further a whole small model may carry them
LOW_PRECISION = 2.0  # a backend's error in low precision, over that of plain low-precision arithmetic
IN_HALF = 4.0  # roundings of half precision by which one call's answer may lie from that in single precision
ON_AVERAGE = 0.05  # of what is read of a whole model, relative: a model in half precision is another one
MERGE = 1e-12  # relative, between two orders of merging float64 statistics


def unit(x: Tensor) -> float:
    """One rounding at the size of a tensor's largest element."""
    size = float(x.detach().abs().max()) if x.numel() else 0.0
    return max(size, 1e-30) * torch.finfo(x.dtype).eps


def error(found: Tensor, requested: Tensor) -> float:
    """The largest difference; infinite where one has NaN or infinity and the other has not."""
    if found.shape != requested.shape:
        return float("inf")
    a, b = found.detach().double(), requested.detach().double()
    strange = ~(a.isfinite() & b.isfinite())
    alike = ((a == b) | (a.isnan() & b.isnan()))[strange]
    if not bool(alike.all()):
        return float("inf")
    gap = (a - b).masked_fill(strange, 0.0).abs()
    return float(gap.max()) if gap.numel() else 0.0


def close(found: Tensor, requested: Tensor, roundings: float = ROUNDINGS) -> bool:
    """Equal but for the order of summation, measured in roundings at the size of what is wanted."""
    apart = error(found, requested)
    return math.isfinite(apart) and apart <= roundings * max(unit(requested), unit(found.to(requested.dtype)))


def close_model(found: Tensor, requested: Tensor) -> bool:
    """Equal but for what a whole small model makes of other orders of summation."""
    return close(found, requested, ROUNDINGS * DEPTH)


def close_on_average(found: Tensor, requested: Tensor) -> bool:
    """Alike on the whole, as what is read of a model is that computes with fewer digits; strange places agree."""
    strange = ~requested.isfinite()
    if not torch.equal(strange, ~found.isfinite()):  # nor are those of other shapes
        return False
    a, b = (x.detach().double().masked_fill(strange, 0.0) for x in (found, requested))
    return float((a - b).abs().sum()) <= ON_AVERAGE * float(b.abs().sum())


def within_budget(found: Tensor, eager: Tensor, exact: Tensor, more: float = 0.0) -> bool:
    """At most a small multiple of the error that plain arithmetic in this precision makes against float64.

    `more` is what else a rounding may come to, as of scores that are large, before their exponential is taken.
    """
    budget = LOW_PRECISION * error(eager, exact) + ROUNDINGS * unit(eager) + more
    return error(found, exact) <= budget
