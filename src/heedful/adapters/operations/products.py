"""Products of two tensors, however a module writes them, and what else it writes between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
BADDBMM = {torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_}
EINSUM = torch.einsum
SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
LOG_SOFTMAX = {torch.log_softmax, Tensor.log_softmax, F.log_softmax, torch.special.log_softmax}
EXP = {torch.exp, Tensor.exp}
DROPOUT = {F.dropout, torch.dropout}
TIMES = {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__}
OVER = {torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__, torch.true_divide}
SAME = {
    Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.unflatten, torch.unflatten,
    Tensor.squeeze, torch.squeeze, Tensor.unsqueeze, torch.unsqueeze, Tensor.contiguous, Tensor.to, Tensor.type,
    Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.clone, torch.clone,
    Tensor.view_as, Tensor.expand, Tensor.expand_as, Tensor.detach,
}  # fmt: skip
COPIED = {torch.clone, Tensor.clone, Tensor.detach, torch.detach}  # mostly to be looked at later
FILLED = {torch.masked_fill, Tensor.masked_fill}
SUBTRACTED = {torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__}
CLAMPED = {torch.clamp, Tensor.clamp, Tensor.clamp_}
BOUNDED = CLAMPED | {torch.max, torch.maximum, Tensor.maximum}
PLUS = {Tensor.add_, Tensor.__iadd__, Tensor.sub_, Tensor.__isub__}
WHERE = {torch.where, Tensor.where}
SUMMED = SUBTRACTED | {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
ADDED = SUMMED | BOUNDED | FILLED | WHERE | {Tensor.masked_fill_}
TURNED: set[Any] = {vars(torch._C.TensorBase)["mT"].__get__, torch.adjoint, Tensor.adjoint}  # the last two axes
SWAPPED = TURNED | {
    torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes, torch.permute, Tensor.permute,
}  # fmt: skip
SPLIT = {torch.chunk, Tensor.chunk, torch.split, Tensor.split, torch.unbind, Tensor.unbind, torch.tensor_split}
PRODUCTS = MATMUL | BADDBMM | {EINSUM}


def sums(func: Any, kwargs: Any, first: bool) -> bool:
    """Whether a call adds to something, which is the first it is given or not, or takes away from it."""
    if func not in SUMMED:
        return False
    return first or (func not in SUBTRACTED and kwargs.get("alpha", 1) == 1)


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
    if func is EINSUM:
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


def dropout_of(args: Any, kwargs: Any) -> tuple[float, bool]:
    told = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    return float(told.get("p", 0.5)), bool(told.get("training", told.get("train", True)))


def swaps(func: Any, args: Any, kwargs: Any, ndim: int) -> bool:
    """Whether a call swaps the last two of as many axes, and does nothing else."""
    if func in TURNED:
        return True
    if func in (torch.permute, Tensor.permute):
        order = args[1:] or (kwargs["dims"],)
        order = order[0] if isinstance(order[0], tuple | list) else order
        return [x % ndim for x in order] == [*range(ndim - 2), ndim - 1, ndim - 2]
    axes = (*args[1:], *(x for name, x in kwargs.items() if name != "input"))
    return {x % ndim for x in axes} == {ndim - 2, ndim - 1}
