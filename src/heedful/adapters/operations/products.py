"""A product of two tensors over one axis, however it is written: matmul, bmm, baddbmm, or an einsum."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
BADDBMM = {torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_}
_EINSUM = torch.einsum
PRODUCTS = _MATMUL | BADDBMM | {_EINSUM}


class Product(NamedTuple):
    """A product `[.., i, d]` with `[.., d, j]`, however it is written."""

    left: Tensor
    right: Tensor
    factor: float = 1.0
    order: tuple[int, ...] | None = None  # the axes of `[.., i, j]` in which it comes out; None: as they are

    def laid(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.permute(self.order)


def product_of(func: Any, args: Any, kwargs: Any, first: Tensor | None = None) -> Product | None:
    """A product in the order of its factors; `first` says which of an einsum's stands on the left."""
    if func is _EINSUM:
        equation, *factors = args
        factors = list(factors[0]) if len(factors) == 1 and isinstance(factors[0], list | tuple) else factors
        return _einsum(equation, factors, first) if isinstance(equation, str) else None
    if func in BADDBMM:
        told = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | kwargs
        found = Product(told["batch1"], told["batch2"], float(told.get("alpha", 1)))
    else:
        factors = [*args, *kwargs.values()]
        if len(factors) < 2 or not all(isinstance(x, Tensor) and x.ndim > 1 for x in factors[:2]):
            return None
        found = Product(factors[0], factors[1])
    return found if first is None or found.left is first else None


def _einsum(equation: str, factors: list[Tensor], first: Tensor | None) -> Product | None:
    """An einsum of two factors over one axis that they share."""
    asked, arrow, out = equation.replace(" ", "").partition("->")
    names = asked.split(",")
    if not arrow or len(factors) != 2 or len(names) != 2 or any(len(set(x)) < len(x) for x in (*names, out)):
        return None
    a, b = names
    swapped = factors[1] is first if first is not None else out[-1:] in a
    if swapped:
        (a, b), factors = (b, a), factors[::-1]
    summed = [x for x in a if x in b and x not in out]
    columns = [x for x in b if x not in a]
    row = a[-2:-1] if first is not None else out[-2:-1]
    if len(summed) != 1 or len(columns) != 1 or not row or row in b or {*a, *b} != {*out, *summed}:
        return None
    of_scores = [x for x in out if x in a and x != row]
    lead = of_scores if first is None else [x for x in a[:-2] if x in of_scores]
    left_axes = (*lead, row, *summed)
    if first is not None and left_axes != tuple(a):
        return None
    left = factors[0].permute([a.index(x) for x in left_axes])
    right = factors[1].permute([b.index(x) for x in (*(x for x in lead if x in b), *summed, *columns)])
    for place, x in enumerate(lead):
        if x not in b:  # several heads of queries share what is keyed
            right = right.unsqueeze(place)
    found = [*lead, row, *columns]
    order = tuple(found.index(x) for x in out)
    return Product(left, right, order=None if order == tuple(range(len(order))) else order)
