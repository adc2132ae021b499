"""Attention that a module writes out: a product of queries and keys, a softmax of it, and a product with the values.

What happens between the two products is followed tensor by tensor. Whatever else a module adds to its scores, such as
masks, positions and biases, is what they differ by from that first product.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.adapters.operations.products import BADDBMM, PRODUCTS, Product, product_of
from heedful.core.stats import narrowed
from heedful.engine.activity import tensors_of

ROUNDINGS = 4  # by which scores may lie off the product that they are, times a number
HIDDEN = -5e3  # what is added to scores nobody sees: no weight is left, in any type
CHANGED = "its weights are changed after a softmax"

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
_COPIED = {torch.clone, Tensor.clone, Tensor.detach, torch.detach}  # mostly to be looked at later
_FILLED = {torch.masked_fill, Tensor.masked_fill}
_SUBTRACTED = {torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__}
_BOUNDED = {torch.max, torch.maximum, Tensor.maximum, torch.clamp, Tensor.clamp, Tensor.clamp_}
_ADDED = _SUBTRACTED | _BOUNDED | _FILLED | {
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.masked_fill_,
    torch.where, Tensor.where,
}  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """What has become of a product of queries and keys so far."""

    now: Tensor  # kept, so that no other tensor has its place
    query: Tensor  # [.., q, d]
    key: Tensor  # [.., k, d]
    scale: float
    learned: bool = False  # what was added wants gradients of its own
    version: int | None = None  # of what was copied: it is known as long as it is not changed

    @property
    def stale(self) -> bool:
        """Whether they were changed after they were copied, where nobody followed."""
        return self.version is not None and self.version != self.now._version

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
    scores: Scores | None  # None: a softmax of something else
    dropout: float = 0.0
    why: str = ""  # they are not what a softmax made of scores
    versions: tuple[int, ...] = ()  # of what they are told by, since anything may be changed in place

    def untouched(self) -> Weights:
        """The same, told by what is there now."""
        return replace(self, versions=self._versions())

    @property
    def touched(self) -> bool:
        return self.versions != self._versions()

    def _versions(self) -> tuple[int, ...]:
        told = (self.now,) if self.scores is None else (self.now, self.scores.now, self.scores.query, self.scores.key)
        return tuple(-1 if x.is_inference() else x._version for x in told)


@dataclass(frozen=True)
class Asked:
    """Values are to be multiplied with weights."""

    scores: Scores
    value: Tensor
    product: Product
    dropout: float

    @property
    def operands(self) -> dict[str, Any]:
        query, key = self.scores.query, self.scores.key
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        value = _beside(self.value, self.product.left, lead).to(query.dtype)
        return {"query": query.expand(*lead, *query.shape[-2:]), "key": key, "value": value}

    def given(self) -> dict[str, Any]:
        """The same as arguments of torch's own attention."""
        scores = self.scores
        added = scores.added()
        if not scores.learned:  # else each number of a table gets a gradient of its own
            added = narrowed(added, range(added.ndim - 1))
        seen = added > HIDDEN
        lowest = torch.finfo(added.dtype).min
        table = added.masked_fill(~seen, lowest)
        return self.operands | {"attn_mask": table, "scale": scores.scale, "dropout_p": self.dropout}

    def given_back(self, heads: Tensor) -> Tensor:
        """Heads in the layout of the queries, as the module's own product would give them."""
        left = self.product.left
        return self.product.laid(heads.reshape(*left.shape[:-1], heads.shape[-1])).to(self.value.dtype)


@dataclass(eq=False)
class Trail:
    """Follows scores from a product to a softmax, and weights from there to the values, through one forward."""

    scores: dict[int, Scores] = field(default_factory=dict)
    weights: dict[int, Weights] = field(default_factory=dict)
    besides: str = ""  # what else weights were used for, which an answer to the product with the values would not reach
    answered: Scores | None = None  # of the weights that were multiplied with values

    def asked(self, func: Any, args: Any, kwargs: Any) -> Asked | str | None:
        """What a call that multiplies values with weights asks for, or why that cannot be told."""
        if func not in PRODUCTS or not self.weights:
            return None
        known = [x for x in tensors_of((*args, *kwargs.values())) if id(x) in self.weights]
        if not known:
            return None
        weights, product = self.weights[id(known[0])], product_of(func, args, kwargs, first=known[0])
        if weights.why or weights.scores is None:
            return weights.why
        if weights.touched:
            return CHANGED
        if len(known) > 1:
            return "its weights are multiplied with one another"
        if func in BADDBMM:
            return "its weights and values are multiplied and added to something at once"
        if product is None or product.left.shape[-1] != weights.scores.key.shape[-2]:
            return "its weights do not stand before the values"
        left, right = product.left.shape[:-2], product.right.shape[:-2]
        if torch.broadcast_shapes(left, right) != left:
            return "its values have rows that its weights do not have"
        self.answered = weights.scores
        return Asked(weights.scores, product.right, product, weights.dropout)

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note what a call made of scores or weights."""
        if not isinstance(out, Tensor):
            self._no_tensor(func, args, kwargs, out)
            return
        if func in PRODUCTS:
            if (product := product_of(func, args, kwargs)) is not None and out.ndim > 2 and product.order is None:
                biases = (*args[:1], kwargs.get("input")) if func in BADDBMM else ()
                learned = any(x.requires_grad for x in tensors_of(biases))
                key = product.right.transpose(-1, -2)
                self.scores[id(out)] = Scores(out, product.left, key, product.factor, learned)
            return
        given = list(tensors_of((*args, *kwargs.values())))
        if func in _SOFTMAX:
            if out.ndim > 2:
                self.weights[id(out)] = self._softmax(args, kwargs, out)
        elif (weights := next((self.weights[id(x)] for x in given if id(x) in self.weights), None)) is not None:
            self._weights(weights, func, args, kwargs, out)
        elif (scores := next((self.scores[id(x)] for x in given if id(x) in self.scores), None)) is not None:
            self._scores(scores, func, args, kwargs, out)

    def gives(self, output: Any) -> bool:
        """Whether weights are among what a module gives."""
        given = [weights for x in tensors_of(_plainly(output)) if (weights := self._answered(x)) is not None]
        if any(weights.why or weights.touched for weights in given):
            self.besides = CHANGED
        return bool(given)

    def put(self, pattern: Tensor | None, output: Any) -> Any:
        """What a module gives, with other weights in place of its own."""
        if isinstance(output, Tensor):
            if self._answered(output) is None:
                return output
            return None if pattern is None else pattern.reshape(output.shape).to(output.dtype)
        if not self.gives(output):
            return output
        if isinstance(output, dict):
            new = copy.copy(output)
            new.update({name: self.put(pattern, x) for name, x in output.items()})
            return new
        if not isinstance(output, list | tuple):
            new = copy.copy(output)
            vars(new).update(self.put(pattern, vars(output)))
            return new
        several = [self.put(pattern, x) for x in output]
        return type(output)(*several) if hasattr(output, "_fields") else type(output)(several)

    def _answered(self, x: Tensor) -> Weights | None:
        """What is known of weights, where they are those that were multiplied with values."""
        found = self.weights.get(id(x))
        return found if found is not None and found.scores is not None and found.scores is self.answered else None

    def clear(self) -> None:
        self.scores.clear()
        self.weights.clear()
        self.besides, self.answered = "", None

    def _no_tensor(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note what became of scores or weights in a call that gives no tensor, or several."""
        given = list(tensors_of((*args, *kwargs.values())))
        into = id(args[0]) if func is Tensor.__setitem__ else None
        if into in self.scores:
            scores = self.scores[into]
            learned = scores.learned or any(x.requires_grad for x in given[1:])
            self.scores[into] = replace(scores, learned=learned)
        if into in self.weights:
            self.weights[into] = replace(self.weights[into], why=CHANGED)
        elif into is not None or next(tensors_of(out), None) is not None:
            known = (self.weights.get(id(x)) for x in given)
            self.besides = next((_besides(func) for one in known if one and one.scores is not None), self.besides)

    def _softmax(self, args: Any, kwargs: Any, out: Tensor) -> Weights:
        scores = self.scores.get(id(args[0] if args else kwargs.get("input")))
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if scores is None or scores.stale:
            return Weights(out, None, why="a softmax of what is no product of queries and keys alone")
        if dim not in (-1, out.ndim - 1):
            return Weights(out, None, why=f"a softmax over axis {dim}")
        if out.shape[-1] != scores.key.shape[-2]:
            return Weights(out, None, why="a softmax over more than the keys, or fewer")
        return Weights(out, scores).untouched()

    def _scores(self, scores: Scores, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        new = _followed(scores, func, args, kwargs, out)
        if func in _COPIED and out is not scores.now and not scores.now.is_inference():
            self.scores[id(scores.now)] = replace(scores, version=scores.now._version)
        elif new is not None or out is scores.now:
            self.scores.pop(id(scores.now), None)
        if new is not None:
            self.scores[id(out)] = new

    def _weights(self, weights: Weights, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        in_place = out is weights.now and func in _DROPOUT and _dropout(args, kwargs)[1]
        if weights.touched and not in_place and not weights.why:  # before this step
            weights = replace(weights, why=CHANGED)
        if func in _DROPOUT:
            rate, trains = _dropout(args, kwargs)
            kept = (1 - weights.dropout) * (1 - rate) if trains else 1 - weights.dropout
            self.weights[id(out)] = replace(weights, now=out, dropout=1 - kept).untouched()
        elif out.numel() == weights.now.numel() and (func in _SAME or _blank(weights, func, out)):
            self.weights[id(out)] = replace(weights, now=out).untouched()
        elif out.numel() == weights.now.numel():
            self.weights[id(out)] = replace(weights, now=out, why=weights.why or CHANGED)
        elif weights.scores is not None:
            self.besides = _besides(func)


def _plainly(output: Any) -> Any:
    """What a module gives, where objects are what they hold."""
    if isinstance(output, list | tuple):
        return [_plainly(x) for x in output]
    if isinstance(output, dict):
        return {name: _plainly(x) for name, x in output.items()}
    return output if isinstance(output, Tensor) else getattr(output, "__dict__", None)


def _besides(func: Any) -> str:
    return f"its weights go into {getattr(func, '__name__', func)} too"


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
    if scores.stale:
        return None
    new = replace(scores, now=out, version=None)
    if func in _SAME or func in _ADDED:
        others = [x for x in tensors_of((*args, *kwargs.values())) if x is not scores.now]
        if func in _BOUNDED and not _far((*args, *kwargs.values()), scores.now):
            return None
        minus = func in _SUBTRACTED and args[0] is not scores.now
        return None if minus else replace(new, learned=new.learned or any(x.requires_grad for x in others))
    if func in _TIMES or func in _OVER:
        first, other = args[0], args[1] if len(args) > 1 else kwargs.get("other")
        by = other if first is scores.now else first
        if func in _OVER and first is not scores.now:
            return None
        return _scaled(new, by, func in _OVER)
    return None


def _far(given: Iterable[Any], scores: Tensor) -> bool:
    """Whether bounds lie where no score that anybody sees is."""
    bounds = [x for x in given if x is not scores and x is not None]
    plain = [x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for x in bounds]
    return all(isinstance(x, int | float) and abs(x) >= -HIDDEN for x in plain)


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
        lead = torch.broadcast_shapes(scores.query.shape[:-2], scores.key.shape[:-2])
        if by.ndim > scores.query.ndim or (by.numel() > 1 and scores.now.shape[:-2] != lead):
            return None
        return replace(scores, query=scores.query * by)
    return scores if bool(((by == 0) | (by == 1)).all()) else None


def _dropout(args: Any, kwargs: Any) -> tuple[float, bool]:
    told = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    return float(told.get("p", 0.5)), bool(told.get("training", told.get("train", True)))


def _beside(value: Tensor, left: Tensor, lead: torch.Size) -> Tensor:
    """Values as they stand beside weights, with the leading axes that the queries have."""
    own = left.shape[:-2]
    if own == lead or own.numel() != lead.numel():
        return value
    return value.expand(*own, *value.shape[-2:]).reshape(*lead, *value.shape[-2:])
