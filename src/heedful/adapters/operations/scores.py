"""What has become of a product of queries and keys, and of the softmax of it, while a module writes attention out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from heedful.adapters.operations import products
from heedful.adapters.operations.products import Product
from heedful.adapters.operations.uses import Origin, overlap
from heedful.core.fitted import narrowed
from heedful.engine.activity import tensors_of

ROUNDINGS = 4  # by which scores may lie off the product that they are, times a number
HIDDEN = -5e3  # what is added to scores nobody sees: no weight is left, in any type


@dataclass(frozen=True)
class Scores:
    """What has become of a product of queries and keys so far."""

    now: Tensor  # kept, so that no other tensor has its place
    query: Tensor  # [.., q, d]
    key: Tensor  # [.., k, d]
    scale: float
    learned: bool = False  # what was added wants gradients of its own
    replaced: tuple[Tensor, ...] = ()  # the places of scores that are the product's no longer, as these lay then
    origin: Origin = field(default_factory=Origin)

    def still(self) -> Scores:
        """The same without gradients."""
        return replace(self, query=self.query.detach(), key=self.key.detach(), learned=False)

    def reads(self, x: Tensor) -> bool:
        """Whether writing into a tensor may change its queries or keys."""
        return overlap(x, self.query) or overlap(x, self.key)

    def not_hidden(self) -> bool:
        """Whether somebody sees a score that was put in the place of the product's."""
        if not self.replaced:
            return False
        seen = self.added().detach() > HIDDEN
        return any(bool((seen & places.reshape(seen.shape)).any()) for places in self.replaced)

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
    turned: bool = False  # queries stand where keys do
    versions: tuple[int, ...] = ()  # of what they are told by, since anything may be changed in place

    def untouched(self) -> Weights:
        """The same, told by what is there now."""
        return replace(self, versions=self._versions())

    @property
    def touched(self) -> bool:
        return self.scores is not None and self.versions != self._versions()

    def _versions(self) -> tuple[int, ...]:
        told = (self.now,) if self.scores is None else (self.now, self.scores.now, self.scores.query, self.scores.key)
        return tuple(-1 if x.is_inference() else x._version for x in told)

    def told_by(self, x: Tensor) -> bool:
        """Whether writing into a tensor may change them, or what they are told by."""
        scores = self.scores
        return overlap(x, self.now) or (scores is not None and (overlap(x, scores.now) or scores.reads(x)))


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
        laid = self.product.laid(heads.reshape(*left.shape[:-1], heads.shape[-1]))
        return laid.to(self.value.dtype).contiguous()  # a product is, and may be viewed otherwise


def blank(weights: Weights, func: Any, out: Tensor) -> bool:
    """Whether nothing became zero but what a mask had hidden, such as a query that sees nothing."""
    if func not in products.FILLED or weights.scores is None:
        return False
    scores = weights.scores.now
    hidden = (scores < torch.finfo(scores.dtype).min / 2).reshape(out.shape)
    return torch.equal(torch.where(hidden, 0.0, weights.now.reshape(out.shape)), out)


def followed(scores: Scores, func: Any, args: Any, kwargs: Any, out: Tensor) -> Scores | None:
    """Scores after one more step, if it is one that can be told."""
    if out.numel() != scores.now.numel():
        return None
    new = replace(scores, now=out)
    if func in products.SAME or func in products.ADDED:
        others = [x for x in tensors_of((*args, *kwargs.values())) if x is not scores.now]
        if func in products.BOUNDED and not _far(func, args, kwargs, scores.now):
            return None
        if func in products.SUMMED and not products.sums(func, kwargs, first=args[0] is scores.now):
            return None
        places = _replaced(func, args, kwargs, scores.now)
        new = new if places is None else replace(new, replaced=(*new.replaced, places.expand_as(scores.now)))
        return replace(new, learned=new.learned or any(x.requires_grad for x in others))
    if func in products.TIMES or func in products.OVER:
        first, other = args[0], args[1] if len(args) > 1 else kwargs.get("other")
        by = other if first is scores.now else first
        if (func in products.OVER and first is not scores.now) or kwargs.get("rounding_mode"):
            return None
        return _scaled(new, by, func in products.OVER)
    return None


def _replaced(func: Any, args: Any, kwargs: Any, scores: Tensor) -> Tensor | None:
    """Where a call puts something else in the place of scores, if somebody may see it."""
    told = list(args)
    if func in products.WHERE:  # of a tensor, it is the second argument
        names = ("input", "condition", "other") if func is Tensor.where else ("condition", "input", "other")
        told = [*told, *(kwargs[name] for name in names[len(told) :])]
        told = told if func is torch.where else [told[1], told[0], told[2]]
        where, one, other = told
        return None if low(other if one is scores else one) else (~where if one is scores else where)
    if func in products.FILLED or func is Tensor.masked_fill_:
        names = ("input", "mask", "value")
        _, where, value = [*told, *(kwargs[name] for name in names[len(told) :])]
        return None if low(value) else where
    return None


def low(value: Any) -> bool:
    """Whether it is a number that hides a score."""
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return isinstance(value, int | float) and value <= HIDDEN


def _far(func: Any, args: Any, kwargs: Any, scores: Tensor) -> bool:
    """Whether bounds lie where no score that anybody sees is."""
    told = [x for x in (*args, *kwargs.values()) if x is not scores]
    if func in products.CLAMPED:
        lower, upper = (kwargs.get(name, args[i] if len(args) > i else None) for i, name in ((1, "min"), (2, "max")))
    else:
        lower, upper = told[0] if len(told) == 1 else scores, None
    return (lower is None or low(lower)) and (upper is None or low(-upper))


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
    if by.requires_grad or not bool(((by == 0) | (by == 1)).all()):
        return None
    return replace(scores, replaced=(*scores.replaced, (by == 0).expand_as(scores.now)))


def _beside(value: Tensor, left: Tensor, lead: torch.Size) -> Tensor:
    """Values as they stand beside weights, with the leading axes that the queries have."""
    own = left.shape[:-2]
    if own == lead or own.numel() != lead.numel():
        return value
    return value.expand(*own, *value.shape[-2:]).reshape(*lead, *value.shape[-2:])
