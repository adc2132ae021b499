"""Attention that a module writes out: a product of queries and keys, a softmax of it, and a product with the values.

What happens between the two products is followed tensor by tensor. Whatever else a module adds to its scores, such as
masks, positions and biases, is what they differ by from that first product.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adapters.operations import products
from heedful.adapters.operations.products import Product, dropout_of, product_of, swaps
from heedful.adapters.operations.scores import Asked, Scores, Weights, blank, followed, low
from heedful.adapters.operations.uses import (
    READS,
    Origin,
    Use,
    Uses,
    name_of,
    overlap,
    place_of,
    takes_shape,
    written_by,
)
from heedful.engine.activity import tensors_of

CHANGED = "its weights are changed after a softmax"
LOGARITHM = "the logarithm of a softmax is used otherwise than to make weights of it"
EXPONENTS = "its scores are made weights by exp, and not by softmax"
APART = "its weights do not stand before the values"
NO_PRODUCT = "a softmax of what is no product of queries and keys alone"


@dataclass(eq=False)
class Trail:
    """Follows scores from a product to a softmax, and weights from there to the values, through one forward."""

    scores: dict[int, Scores] = field(default_factory=dict)
    weights: dict[int, Weights] = field(default_factory=dict)
    besides: str = ""  # what else weights or scores were used for, which an answer would not reach
    answered: Scores | None = None  # of the weights that were multiplied with values
    left_alone: str = ""  # a softmax that may be no attention, multiplied with something
    uses: Uses = field(default_factory=Uses)

    def asked(self, func: Any, args: Any, kwargs: Any) -> Asked | str | None:
        """What a call that multiplies values with weights asks for, or why that cannot be told."""
        if func in products.PRODUCTS and self.uses.exponents(tensors_of((*args, *kwargs.values()))):
            return EXPONENTS
        if not self.weights:
            return None
        known = [x for x in tensors_of((*args, *kwargs.values())) if id(x) in self.weights]
        if func in products.DROPOUT:  # it may be in place, and then what was changed before it is not told any more
            self._note_changed(known)
        if func not in products.PRODUCTS or not known:
            return None
        known = [x for x in known if (one := self.weights[id(x)]).scores is not None or one.why]
        if not known:
            self.left_alone = NO_PRODUCT
            return None
        weights = self.weights[id(known[0])]
        if weights.why or weights.scores is None:
            return weights.why
        if weights.touched:
            return CHANGED
        if len(known) > 1:
            return "its weights are multiplied with one another"
        if func in products.BADDBMM:
            return "its weights and values are multiplied and added to something at once"
        product = _from_the_right(func, args, kwargs, known[0]) if weights.turned else None
        product = product if weights.turned else product_of(func, args, kwargs, first=known[0])
        if product is None or product.left.shape[-1] != weights.scores.key.shape[-2]:
            if not is_weight(weights.scores.key):
                return APART
            self.left_alone = APART  # a softmax over what a weight holds may be a mixture of experts
            return None
        left, right = product.left.shape[:-2], product.right.shape[:-2]
        if torch.broadcast_shapes(left, right) != left:
            return "its values have rows that its weights do not have"
        if weights.scores.not_hidden():
            return "some of its scores are replaced by others, which are seen"
        self.answered = weights.scores
        still = torch.is_grad_enabled() and not known[0].requires_grad
        return Asked(weights.scores.still() if still else weights.scores, product.right, product, weights.dropout)

    def _note_changed(self, known: Iterable[Tensor]) -> None:
        for x in known:
            weights = self.weights[id(x)]
            if weights.touched and not weights.why:
                self.weights[id(x)] = replace(weights, why=CHANGED)

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note what a call made of scores or weights."""
        given = list(tensors_of((*args, *kwargs.values())))
        if (into := written_by(func, args, kwargs)) is not None:
            self._wrote(into, func, given)
        if not isinstance(out, Tensor):
            self._no_tensor(func, args, kwargs, given, out)
        elif func in products.PRODUCTS:
            self._multiplied(func, args, kwargs, given, out)
        elif func in products.SOFTMAX or func in products.LOG_SOFTMAX:
            if out.ndim > 2:
                made = self._softmax(func, args, kwargs, out)
                log = func in products.LOG_SOFTMAX and made.scores is not None
                self.weights[id(out)] = replace(made, why=LOGARITHM) if log else made
        elif takes_shape(func, args, (*self.weights, *self.scores)):
            return
        elif (weights := next((self.weights[id(x)] for x in given if id(x) in self.weights), None)) is not None:
            self._weights(weights, func, args, kwargs, out)
        elif (scores := next((self.scores[id(x)] for x in given if id(x) in self.scores), None)) is not None:
            self._scores(scores, func, args, kwargs, out)
        else:
            self.uses.aside(func, args, kwargs, given, (out,))

    def _multiplied(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], out: Tensor) -> None:
        self.uses.aside(func, args, kwargs, given, (out,))
        product = product_of(func, args, kwargs)
        if product is None or out.ndim < 3 or product.order is not None or any(map(self._made, given)):
            return
        biases = (*args[:1], kwargs.get("input")) if func in products.BADDBMM else ()
        learned = any(x.requires_grad for x in tensors_of(biases))
        origin = Origin(fixed=any(map(is_weight, given)))
        scores = Scores(out, product.left, product.right.transpose(-1, -2), product.factor, learned, origin=origin)
        self.scores[id(out)] = scores
        if not any(id(x) in self.weights for x in given):
            self.uses.note(out, *self.uses.of(out), Use(scores.origin))

    def _made(self, x: Tensor) -> bool:
        """Whether scores were made weights in a tensor: what these are multiplied with is scores no more."""
        found = self.weights.get(id(x))
        return found is not None and found.scores is not None

    def _wrote(self, into: Tensor, func: Any, given: list[Tensor]) -> None:
        """A tensor was written into, and with it whatever lies in the same memory."""
        for place, weights in self.weights.items():
            mine = into is weights.now and func in products.DROPOUT
            if weights.scores is not None and not weights.why and not mine and weights.told_by(into):
                self.weights[place] = replace(weights, why=CHANGED)
        for place, scores in list(self.scores.items()):
            if scores.reads(into) and into is not scores.now:
                self.scores.pop(place)
            elif into is not scores.now and self.uses.of(into) and overlap(into, scores.now):
                if func not in products.PLUS:
                    self.scores.pop(place)
                elif any(x.requires_grad for x in given):
                    self.scores[place] = replace(scores, learned=True)

    def gives(self, output: Any) -> bool:
        """Whether weights are among what a module gives."""
        given = [weights for x in tensors_of(_plainly(output)) if (weights := self._answered(x)) is not None]
        if self.answered is not None and not self.besides:
            origin = self.answered.origin
            kept = any(use.origin is origin and not use.by for x in tensors_of(output) for use in self.uses.of(x))
            self.besides = "its scores are given too" if kept else origin.elsewhere
        if any(weights.why or weights.touched for weights in given):
            self.besides = CHANGED
        return bool(given)

    def put(self, pattern: Tensor | None, output: Any) -> Any:
        """What a module gives, with other weights in place of its own."""
        if isinstance(output, Tensor):
            if (weights := self._answered(output)) is None:
                return output
            if pattern is None:
                return None
            own = output.mT if weights.turned else output
            given = pattern.reshape(own.shape).to(output.dtype)
            return given.mT if weights.turned else given
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
        if found is None or found.scores is None or self.answered is None:
            return None
        return found if found.scores.origin is self.answered.origin else None

    def clear(self, kept: Collection[int] = ()) -> None:
        """Forget what was followed, but for some scores."""
        self.scores = {place: x for place, x in self.scores.items() if place in kept}
        self.weights.clear()
        self.besides, self.answered, self.left_alone = "", None, ""

    def _no_tensor(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], out: Any) -> None:
        """Note what became of scores or weights in a call that gives no tensor, or several."""
        into, made = id(args[0]) if func is Tensor.__setitem__ else None, list(tensors_of(out))
        if into in self.scores:
            self.scores[into] = self._set(self.scores[into], args, given)
        elif into not in self.weights:
            self.uses.aside(func, args, kwargs, given, made)
        if into in self.weights:
            return  # and they are told to be changed
        if func in products.SPLIT and (weights := self.weights.get(id(given[0]))) is not None:
            self._parts(weights, func, made)
        if into is not None or made or name_of(func) in READS:
            known = (self.weights.get(id(x)) for x in given)
            self.besides = next((_besides(func) for one in known if one and one.scores is not None), self.besides)

    def _set(self, scores: Scores, args: Any, given: list[Tensor]) -> Scores:
        """Scores into some of whose places something was written."""
        _, where, value = args
        there, uses = place_of(scores.now[where]), self.uses.of(value) if isinstance(value, Tensor) else ()
        if own := [use for use in uses if use.origin is scores.origin and use.part == there]:
            own[0].used = True  # as after `scores[..] += x`
        elif not low(value):
            places = torch.zeros(scores.now.shape, dtype=torch.bool, device=scores.now.device)
            places[where] = True
            scores = replace(scores, replaced=(*scores.replaced, places))
        return replace(scores, learned=scores.learned or any(x.requires_grad for x in given[1:]))

    def _softmax(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> Weights:
        given = args[0] if args else kwargs.get("input")
        scores = self.scores.get(id(given))
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if scores is None:
            self.uses.aside(func, args, kwargs, (given,), ())
            return Weights(out, None, why=NO_PRODUCT if self.uses.of(given) else "")
        if dim not in (-1, out.ndim - 1):
            return Weights(out, None, why=f"a softmax over axis {dim}")
        if out.shape[-1] != scores.key.shape[-2]:
            return Weights(out, None, why="a softmax over more than the keys, or fewer")
        return Weights(out, scores).untouched()

    def _scores(self, scores: Scores, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        others = [x for x in tensors_of((*args, *kwargs.values())) if x is not scores.now]
        new = None if self._mixed(scores, func, others) else followed(scores, func, args, kwargs, out)
        if out is scores.now or (new is not None and func not in products.COPIED):
            self.scores.pop(id(scores.now), None)
        if new is not None:
            self.scores[id(out)] = new
            self.uses.goes_on(scores.now, scores.origin, func, args, kwargs, others, out)
        else:
            self.uses.aside(func, args, kwargs, (scores.now, *others), (out,))

    def _mixed(self, scores: Scores, func: Any, others: Iterable[Tensor]) -> bool:
        """Whether scores meet what was made of them, but for a number that all of a row share."""
        own = (x for x in others if any(use.origin is scores.origin for use in self.uses.of(x)))
        return any(func not in products.SUBTRACTED or (x.numel() > 1 and x.shape[-1] > 1) for x in own)

    def _weights(self, weights: Weights, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        in_place = out is weights.now and func in products.DROPOUT and dropout_of(args, kwargs)[1]
        if weights.touched and not in_place and not weights.why:  # before this step
            weights = replace(weights, why=CHANGED)
        same, log = out.numel() == weights.now.numel(), weights.why == LOGARITHM and weights.scores is not None
        if log and func in products.EXP and not weights.touched and out is not weights.now:
            self.weights[id(out)] = replace(weights, now=out, why="").untouched()
        elif func in products.DROPOUT and not log:
            rate, trains = dropout_of(args, kwargs)
            kept = (1 - weights.dropout) * (1 - rate) if trains else 1 - weights.dropout
            self.weights[id(out)] = replace(weights, now=out, dropout=1 - kept).untouched()
        elif same and (func in products.SAME or (not log and blank(weights, func, out))):
            self.weights[id(out)] = replace(weights, now=out).untouched()
        elif same and func in products.SWAPPED and swaps(func, args, kwargs, out.ndim):
            self.weights[id(out)] = replace(weights, now=out, turned=not weights.turned).untouched()
        elif weights.scores is None and (same or func in products.SAME):
            self.weights[id(out)] = replace(weights, now=out)  # as little attention as it was
        elif same:
            self.weights[id(out)] = replace(weights, now=out, why=CHANGED if log else weights.why or CHANGED)
        else:
            others = (x for x in tensors_of((*args, *kwargs.values())) if id(x) not in self.weights)
            if all(x.numel() == 1 or not x.is_floating_point() for x in others):
                self._parts(weights, func, (out,))
            if weights.scores is not None:
                self.besides = _besides(func)

    def _parts(self, weights: Weights, func: Any, made: Iterable[Tensor]) -> None:
        """Parts or means of weights are weights too, if not those that a softmax made."""
        if weights.scores is not None or weights.why:
            part = replace(weights, scores=None, why=weights.why or _besides(func))
            self.weights |= {id(x): replace(part, now=x) for x in made if x.ndim > 1}


def _plainly(output: Any) -> Any:
    """What a module gives, where objects are what they hold."""
    if isinstance(output, list | tuple):
        return [_plainly(x) for x in output]
    if isinstance(output, dict):
        return {name: _plainly(x) for name, x in output.items()}
    return output if isinstance(output, Tensor) else getattr(output, "__dict__", None)


def is_weight(x: Tensor) -> bool:
    """Whether a tensor is a parameter of a model, or a view of one."""
    return isinstance(x if x._base is None else x._base, nn.Parameter)


def _besides(func: Any) -> str:
    return f"its weights go into {name_of(func)} too"


def _from_the_right(func: Any, args: Any, kwargs: Any, turned: Tensor) -> Product | None:
    """Values `[.., d, k]` times weights whose axes are swapped, which is weights times values with axes swapped."""
    found = product_of(func, args, kwargs) if func in products.MATMUL else None
    if found is None or found.right is not turned:
        return None
    n = turned.ndim
    return Product(turned.mT, found.left.mT, order=(*range(n - 2), n - 1, n - 2))
