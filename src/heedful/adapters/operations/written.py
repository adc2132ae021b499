"""Attention that a module writes out: a product of queries and keys, a softmax of it, and a product with the values.

What happens between the two products is followed tensor by tensor. Whatever else a module adds to its scores, such as
masks, positions and biases, is what they differ by from that first product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDINGS = 4  # by which scores may lie off the product that they are, times a number
HIDDEN = -5e3  # what is added to scores nobody sees: no weight is left, in any type

_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_BADDBMM = {torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_}
_EINSUM = torch.einsum
_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
_DROPOUT = {F.dropout, torch.dropout}
_TIMES = {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__}
_OVER = {torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__, torch.true_divide}
_SAME = {
    Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.unflatten, torch.unflatten,
    Tensor.squeeze, torch.squeeze, Tensor.unsqueeze, torch.unsqueeze, Tensor.contiguous, Tensor.to, Tensor.type,
    Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.clone, torch.clone,
    Tensor.view_as, Tensor.expand, Tensor.expand_as, Tensor.detach,
}  # fmt: skip
_FILLED = {torch.masked_fill, Tensor.masked_fill}
_ADDED = {
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, torch.sub, Tensor.sub,
    Tensor.sub_, Tensor.__sub__, Tensor.__isub__, torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_,
    torch.where, Tensor.where, torch.max, torch.maximum, Tensor.maximum, torch.clamp, Tensor.clamp, Tensor.clamp_,
}  # fmt: skip
PRODUCTS = _MATMUL | _BADDBMM | {_EINSUM}


class Product(NamedTuple):
    """A product `[.., i, d]` with `[.., d, j]`, however it is written."""

    left: Tensor
    right: Tensor
    factor: float = 1.0
    order: tuple[int, ...] | None = None  # the axes of `[.., i, j]` in which it comes out; None: as they are

    def laid(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.permute(self.order)


@dataclass(frozen=True)
class Scores:
    """What has become of a product of queries and keys so far."""

    now: Tensor  # kept, so that no other tensor has its place
    query: Tensor  # [.., q, d]
    key: Tensor  # [.., k, d]
    scale: float
    learned: bool = False  # what was added wants gradients of its own

    def added(self) -> Tensor:
        """What the scores are above the scaled product, `[.., q, k]`."""
        plain = torch.matmul(self.query, self.key.transpose(-1, -2))
        eps = torch.finfo(plain.dtype).eps
        now, plain = self.now.reshape(plain.shape), self.scale * plain.to(self.now.dtype)
        if self.learned:
            return now - plain
        more = (now - plain).detach()
        return more.masked_fill(more.abs() <= ROUNDINGS * eps * plain.detach().abs(), 0.0)


@dataclass(frozen=True)
class Weights:
    """What has become of the softmax of scores so far."""

    now: Tensor
    scores: Scores | None
    dropout: float = 0.0
    why: str = ""  # nothing can be told of where they come from


@dataclass(frozen=True)
class Asked:
    """Values are to be multiplied with weights."""

    scores: Scores
    value: Tensor
    product: Product
    dropout: float

    @property
    def operands(self) -> dict[str, Any]:
        return {"query": self.scores.query, "key": self.scores.key, "value": self._beside()}

    def given(self) -> dict[str, Any]:
        """The same as arguments of torch's own attention."""
        scores = self.scores
        added = _narrowed(scores.added())
        seen = added > HIDDEN
        lowest = torch.finfo(added.dtype).min
        table = added.masked_fill(~seen, lowest)
        return self.operands | {"attn_mask": table, "scale": scores.scale, "dropout_p": self.dropout}

    def _beside(self) -> Tensor:
        """The values, with the axes that the queries have."""
        value, query = self.value, self.scores.query
        lead = query.shape[:-2]
        same = value.shape[:-2].numel() == lead.numel() and value.ndim != query.ndim
        return value.reshape(*lead, *value.shape[-2:]) if same else value

    def given_back(self, heads: Tensor) -> Tensor:
        """Heads in the layout of the queries, as the module's own product would give them."""
        left = self.product.left
        return self.product.laid(heads.reshape(*left.shape[:-1], heads.shape[-1]))


@dataclass(eq=False)
class Trail:
    """Follows scores from a product to a softmax, and weights from there to the values, through one forward."""

    scores: dict[int, Scores] = field(default_factory=dict)
    weights: dict[int, Weights] = field(default_factory=dict)
    besides: str = ""  # what else weights were used for, which an answer to the product with the values would not reach

    def asked(self, func: Any, args: Any, kwargs: Any) -> Asked | str | None:
        """What a call that multiplies values with weights asks for, or why that cannot be told."""
        if func not in PRODUCTS or not self.weights:
            return None
        known = [x for x in _tensors((*args, *kwargs.values())) if id(x) in self.weights]
        if not known:
            return None
        weights, product = self.weights[id(known[0])], _product(func, args, kwargs, first=known[0])
        if weights.scores is None:
            return weights.why
        if product is None or product.left.numel() != weights.now.numel():
            return "its weights do not stand before the values"
        return Asked(weights.scores, product.right, product, weights.dropout)

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note what a call made of scores or weights."""
        if not isinstance(out, Tensor):
            return
        if func in PRODUCTS:
            if (product := _product(func, args, kwargs)) is not None and out.ndim > 2 and product.order is None:
                learned = func in _BADDBMM and any(x.requires_grad for x in _tensors((args[0], kwargs.get("input"))))
                key = product.right.transpose(-1, -2)
                self.scores[id(out)] = Scores(out, product.left, key, product.factor, learned)
            return
        given = list(_tensors((*args, *kwargs.values())))
        if func in _SOFTMAX:
            if out.ndim > 2:
                self.weights[id(out)] = self._softmax(args, kwargs, out)
        elif (weights := next((self.weights[id(x)] for x in given if id(x) in self.weights), None)) is not None:
            self._weights(weights, func, args, kwargs, out)
        elif (scores := next((self.scores[id(x)] for x in given if id(x) in self.scores), None)) is not None:
            self._scores(scores, func, args, kwargs, out)

    def gives(self, output: Any) -> bool:
        """Whether weights are among what a module gives."""
        return any(id(x) in self.weights for x in _tensors((output,)))

    def put(self, pattern: Tensor | None, output: Any) -> Any:
        """What a module gives, with other weights in place of its own."""
        if isinstance(output, Tensor) and id(output) in self.weights:
            return None if pattern is None else pattern.reshape(output.shape).to(output.dtype)
        if type(output) in (tuple, list):
            return type(output)(self.put(pattern, x) for x in output)
        return output

    def clear(self) -> None:
        self.scores.clear()
        self.weights.clear()
        self.besides = ""

    def _softmax(self, args: Any, kwargs: Any, out: Tensor) -> Weights:
        scores = self.scores.get(id(args[0] if args else kwargs.get("input")))
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if scores is None:
            return Weights(out, None, why="a softmax of what is no product of queries and keys alone")
        if dim not in (-1, out.ndim - 1):
            return Weights(out, None, why=f"a softmax over axis {dim}")
        return Weights(out, scores)

    def _scores(self, scores: Scores, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        new = _followed(scores, func, args, kwargs, out)
        if new is not None:
            self.scores.pop(id(scores.now), None)
            self.scores[id(out)] = new

    def _weights(self, weights: Weights, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        if func in _DROPOUT:
            rate, trains = _dropout(args, kwargs)
            self.weights[id(out)] = replace(weights, now=out, dropout=rate if trains else weights.dropout)
        elif out.numel() == weights.now.numel() and (func in _SAME or _blank(weights, func, out)):
            self.weights[id(out)] = replace(weights, now=out)
        elif out.numel() == weights.now.numel():
            why = weights.why or "its weights are changed after a softmax"
            self.weights[id(out)] = Weights(out, None, why=why)
        elif weights.scores is not None:
            self.besides = f"its weights go into {getattr(func, '__name__', func)} too"


def _blank(weights: Weights, func: Any, out: Tensor) -> bool:
    """Whether nothing became zero but what a mask had hidden, such as a query that sees nothing."""
    if func not in _FILLED or weights.scores is None:
        return False
    scores = weights.scores.now
    hidden = (scores < torch.finfo(scores.dtype).min / 2).reshape(out.shape)
    return torch.equal(torch.where(hidden, 0.0, weights.now.reshape(out.shape)), out)


def _followed(scores: Scores, func: Any, args: Any, kwargs: Any, out: Tensor) -> Scores | None:
    """Scores after one more step, if it is one that can be told."""
    if out.numel() != scores.now.numel():
        return None
    new = replace(scores, now=out)
    if func in _SAME or func in _ADDED:
        others = [x for x in _tensors((*args, *kwargs.values())) if x is not scores.now]
        minus = func in _SUBTRACTED and args[0] is not scores.now
        return None if minus else replace(new, learned=new.learned or any(x.requires_grad for x in others))
    if func in _TIMES or func in _OVER:
        first, other = args[0], args[1] if len(args) > 1 else kwargs.get("other")
        by = other if first is scores.now else first
        if func in _OVER and first is not scores.now:
            return None
        return _scaled(new, by, func in _OVER)
    return None


_SUBTRACTED = {torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__}


def _scaled(scores: Scores, by: Any, over: bool) -> Scores | None:
    """Scores that a number, a number for each head, or a table of ones and zeros is multiplied with."""
    if isinstance(by, Tensor) and by.numel() == 1:
        by = by.detach().item() if not by.requires_grad else by
    if isinstance(by, int | float):
        return replace(scores, scale=scores.scale / by if over else scores.scale * by)
    if not isinstance(by, Tensor):
        return None
    by = 1 / by if over else by
    if by.numel() == 1 or (by.ndim > 1 and by.shape[-2:].numel() == 1):
        if by.ndim > scores.query.ndim:
            return None
        return replace(scores, query=scores.query * by)
    return scores if bool(((by == 0) | (by == 1)).all()) else None


def _product(func: Any, args: Any, kwargs: Any, first: Tensor | None = None) -> Product | None:
    """A product in the order of its factors; `first` says which of an einsum's stands on the left."""
    if func is _EINSUM:
        equation, *factors = args
        factors = list(factors[0]) if len(factors) == 1 and isinstance(factors[0], list | tuple) else factors
        return _einsum(equation, factors, first) if isinstance(equation, str) else None
    if func in _BADDBMM:
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
    lead = [x for x in a if x in b and x in out]
    summed = [x for x in a if x in b and x not in out]
    rows, columns = ([x for x in one if x not in other] for one, other in ((a, b), (b, a)))
    if not len(summed) == len(rows) == len(columns) == 1 or {*lead, *rows, *columns} != set(out):
        return None
    left = factors[0].permute([a.index(x) for x in (*lead, *rows, *summed)])
    right = factors[1].permute([b.index(x) for x in (*lead, *summed, *columns)])
    found = [*lead, *rows, *columns]
    order = tuple(found.index(x) for x in out)
    if first is not None and [a.index(x) for x in (*lead, *rows, *summed)] != list(range(len(a))):
        return None
    return Product(left, right, order=None if order == tuple(range(len(order))) else order)


def _dropout(args: Any, kwargs: Any) -> tuple[float, bool]:
    told = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    return float(told.get("p", 0.5)), bool(told.get("training", told.get("train", True)))


def _narrowed(x: Tensor) -> Tensor:
    """The same with one row where all rows of an axis are alike."""
    for axis in range(x.ndim - 1):
        if x.shape[axis] > 1 and torch.equal(x, x.narrow(axis, 0, 1).expand_as(x)):
            x = x.narrow(axis, 0, 1)
    return x


def _tensors(args: Any) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)
