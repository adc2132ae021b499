"""Tensors of yes and no, taken as bytes: on a CPU torch reduces, joins and compares those many times faster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.autograd.forward_ad import unpack_dual

CHUNK = 1 << 19  # numbers whose flags are made numbers at once


def some(x: Tensor, dim: int) -> Tensor:
    """`x.any(dim)`."""
    return x.view(torch.uint8).amax(dim).view(torch.bool) if x.shape[dim] else x.any(dim)


def every(x: Tensor, dim: int) -> Tensor:
    """`x.all(dim)`."""
    return x.view(torch.uint8).amin(dim).view(torch.bool) if x.shape[dim] else x.all(dim)


def both(a: Tensor, b: Tensor) -> Tensor:
    """`a & b`."""
    return (a.view(torch.uint8) & b.view(torch.uint8)).view(torch.bool)


def either(a: Tensor, b: Tensor) -> Tensor:
    """`a | b`."""
    return (a.view(torch.uint8) | b.view(torch.uint8)).view(torch.bool)


def numbers(x: Tensor, like: Tensor) -> Tensor:
    """Ones and zeros of the type of `like`."""
    return x.view(torch.uint8).to(like.dtype)


def whole(most: int) -> torch.dtype:
    """The narrowest type for numbers from `-most` to `most` that `between` compares fast."""
    return torch.int16 if most < 1 << 15 else torch.int32


def between(x: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """`(x >= start) & (x < stop)`, of numbers of one type; the fewer bytes it has, the faster."""
    return both(_compared(torch.ge, x, start), _compared(torch.lt, x, stop))


def at_least(a: Tensor, b: Tensor) -> Tensor:
    """`a >= b`, of numbers of one type."""
    return _compared(torch.ge, a, b)


def same(a: Tensor, b: Tensor) -> Tensor:
    """`a == b`, of numbers of one type."""
    return _compared(torch.eq, a, b)


def reaches(x: Tensor, limit: Tensor) -> Tensor:
    """`x [... 1 k] <= limit [... r 1]`, of numbers of one type; what all rows agree on is not asked of each of them."""
    if traced(x, limit) or x.device.type != "cpu":
        return at_least(limit, x)
    near = left_out(at_least(limit.amin(-2, keepdim=True), x), x)
    if near is not None and 2 * (near.stop - near.start) > x.shape[-1]:
        return at_least(limit, x)
    found = torch.ones(torch.broadcast_shapes(x.shape, limit.shape), dtype=torch.bool)
    if near is not None:
        found[..., near] = at_least(limit, x[..., near])
    return found


def meets(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Whether the whole numbers of some pair share a bit."""
    shared = _shared(pairs)
    return _compared(torch.ne, shared, shared.new_zeros(()))


def apart(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Whether those of no pair do."""
    shared = _shared(pairs)
    return _compared(torch.eq, shared, shared.new_zeros(()))


def _shared(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    return reduce(or_, (a & b for a, b in pairs))


def traced(*given: Tensor) -> bool:
    """Whether torch carries derivatives forward here, or runs over many inputs at once: it alone sees the numbers."""
    for x in given:
        if is_functorch_wrapped_tensor(x) or (forward_ad._current_level >= 0 and unpack_dual(x).tangent is not None):
            return True
    return False


def _compared(how: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    if is_functorch_wrapped_tensor(a) or is_functorch_wrapped_tensor(b):  # which give nothing into a tensor of ours
        return how(a, b)
    found = how(a, b, out=torch.empty(0, dtype=a.dtype, device=a.device))
    return found.view(torch.bool) if a.dtype is torch.uint8 else found.to(torch.bool)


def zeroed(x: Tensor, keep: Tensor, into: bool = False, near: slice | None = None) -> Tensor:
    """`x [... r k]` where `keep` says so, and zeros elsewhere, whatever stood there; `into` itself where it may.

    It is `x` itself where that is so already. Nothing comes back through the other pairs. Who knows the columns
    `left_out` says them as `near`.
    """
    if traced(x, keep):
        return x.masked_fill(~keep, 0.0)
    near = near or left_out(keep, x)
    if near is None:
        return x
    if x.requires_grad and torch.is_grad_enabled():
        found: Tensor = _Zeroed.apply(x, keep, near)
        return found
    keep = _spread(keep, x)
    part = x.detach()[..., near]
    clean = _products(part, keep[..., near])
    if torch.equal(part, clean):
        return x
    if not into and clean.shape == x.shape:
        return clean
    x = x if into else x.clone()
    x[..., near] = clean
    return x


class _Zeroed(torch.autograd.Function):
    """There and back through the columns alone that some row leaves out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, near: slice) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.near = near
        return zeroed(x, keep, near=near)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return zeroed(given, keep, near=ctx.near), None, None


def _products(x: Tensor, keep: Tensor) -> Tensor:
    """A new tensor of what is kept, and zeros."""
    if x.device.type != "cpu" or not _reach(x) < torch.inf:
        return x.masked_fill(~keep, 0.0)
    out = torch.empty_like(x)
    for part, those, to in _chunks(x, keep, out):
        torch.mul(part, numbers(those, part), out=to)
    return out


def lowered(x: Tensor, keep: Tensor, into: bool = False, cut: bool = False, near: slice | None = None) -> Tensor:
    """`x [... r k]` where `keep` says so, and the least number elsewhere; `into` itself where it may.

    It is `x` itself where all are kept. What comes back through the least number is not `cut` off where `keep` says no:
    nothing does from a softmax. `near` is as in `zeroed`.
    """
    if traced(x, keep):
        return x.masked_fill(~keep, torch.finfo(x.dtype).min)
    near = near or left_out(keep, x)
    if near is None:
        return x
    keep = _spread(keep, x)
    if near == slice(0, keep.shape[-1]):
        return _sums(x, keep, into, cut)
    x = x if into else x.clone()
    _sums(x[..., near], keep[..., near], True, cut)
    return x


def left_out(keep: Tensor, x: Tensor) -> slice | None:
    """The columns of `x [... r k]` from the first to the last that `keep` leaves out of a row; None where all are kept.

    Looking has to wait for a GPU. Where nobody can look it is all columns.
    """
    if traced(keep):
        return slice(0, x.shape[-1])
    columns = (~every(_spread(keep, x).flatten(0, -2), 0)).nonzero()[:, 0]
    return slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else None


def _sums(x: Tensor, keep: Tensor, into: bool, cut: bool) -> Tensor:
    """The least number plus one that is not of its own size is the least number; of its own size is what was hidden."""
    least, far = torch.finfo(x.dtype).min, torch.finfo(x.dtype).max * torch.finfo(x.dtype).eps / 4
    if x.device.type != "cpu" or not (reach := _reach(x)) < torch.inf:
        return x.masked_fill_(~keep, least) if into else x.masked_fill(~keep, least)
    cut = cut or reach >= far
    if x.requires_grad:
        gone = numbers(~keep, x)
        if cut:
            x, into = (x.mul_ if into else x.mul)(1 - gone), True
        return x.add_(gone, alpha=least) if into else x.add(gone, alpha=least)
    out = x if into else torch.empty_like(x)
    for part, those, to in _chunks(x, keep, out):
        left = torch.mul(part, numbers(those, part), out=to) if cut else part
        torch.add(left, numbers(~those, part), alpha=least, out=to)
    return out


def _spread(keep: Tensor, x: Tensor) -> Tensor:
    """Flags for all rows and columns of `x`."""
    return keep.expand(*keep.shape[:-2], *x.shape[-2:])


def _chunks(x: Tensor, keep: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some rows of each, few enough for what is made of them to stay in a core's cache."""
    rows = max(1, CHUNK * x.shape[-2] // x.numel())
    yield from zip(x.split(rows, -2), keep.split(rows, -2), out.split(rows, -2), strict=True)


def _reach(x: Tensor) -> float:
    """How far the farthest is from zero, and no number where one is none."""
    if not x.numel():
        return 0.0
    low, high = x.detach().aminmax()
    return float(torch.maximum(-low, high))
