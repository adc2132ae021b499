"""What methods share that round a layer's projections by what these are shown: layer after layer, and what is read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Interval
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Layer
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.kinds.weights import HeadWeights, Surgery
from heedful.core.method import Method, Stack
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.kit.batches import at_least_one
from heedful.methods.compress.quantise._quantiser import Quantiser, matrix, written

Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a fit may look at to round some of a layer's projections."""

    layer: Layer
    letters: str
    own: FitContext  # the model as it was
    now: FitContext  # the same with what is rounded already
    batches: Batches

    def matrices(self) -> dict[str, Tensor]:
        """The projections `[o i]`, in float64."""
        weights = self.own.weights(self.layer.number)
        return {letter: matrix(weights, letter).double() for letter in self.letters}


class Calibrated(Quantiser, abstract=True):
    """Rounds one layer after the other, each on what the layers before it, rounded already, hand it.

    `fit` takes batches of text, and keeps what is to be written.
    """

    turns: ClassVar[tuple[str, ...]] = ("qkv", "o")  # which of a layer's projections are rounded at once
    bits: Annotated[int, Interval(ge=2, le=8)] = 3  # of a weight
    found: Fitted | None = field(default=None, kw_only=True)  # "LAYER.LETTER" [o i]

    @classmethod
    def neutral(cls) -> Self:
        return cls(projections="")

    @abstractmethod
    def learned(self, lesson: Lesson) -> dict[str, Tensor]:
        """The rounded matrices `[o i]`, by their letters."""

    @torch.no_grad()
    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> Self:
        shown = [dict(batch) for batch in at_least_one(self, batches)]
        found: dict[str, Tensor] = {}
        for layer in context.layers:
            for turn in self.turns if self.layers is None or layer.number in self.layers else ():
                if letters := "".join(letter for letter in turn if letter in self.projections):
                    now = context.after(_Written(Fitted(found)))
                    fresh = self.learned(Lesson(layer, letters, context, now, shown))
                    found |= {f"{layer.number}.{letter}": x for letter, x in fresh.items()}
        return replace(self, found=Fitted(found))

    def rounded(self, matrices: dict[str, Tensor], weights: HeadWeights, layer: Layer) -> dict[str, Tensor]:
        good = f"heedful.fit({type(self).__name__}(), model, batches)"
        if self.found is None:
            raise FieldError(self, "found", None, "is not known yet: fit", good)
        out = {}
        for letter, x in matrices.items():
            new = self.found.get(f"{layer.number}.{letter}")
            if new is None or new.shape != x.shape:
                shape = None if new is None else tuple(new.shape)
                rule = f"must be {tuple(x.shape)} for projection {letter} of layer {layer.number}: fit to this model"
                raise FieldError(self, "found", shape, rule, good)
            out[letter] = new
        return out


class _Written(Surgery):
    """Puts matrices in place, where there are any."""

    found: Fitted

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        mine = {name: x for name, x in self.found.items() if name.startswith(f"{layer.number}.")}
        return written(weights, {name[-1]: x for name, x in mine.items()})


class _Shown(Method):
    """What the layer's queries, keys and values are made of; padding is zero."""

    @reads(Site.HIDDEN)
    def read(self, x: Tensor, call: Call) -> Cat:
        return Cat.of("x", x * call.is_text[:, 0, :, None])


class _HandedOn(Method):
    """What the layer's heads hand to the output projection, `[b n h d]` in one row; padding is zero."""

    @reads(Site.HEAD_OUTPUT)
    def read(self, heads: Tensor, call: Call) -> Cat:
        return Cat.of("x", heads.transpose(1, 2).flatten(2) * call.is_text[:, 0, :, None])


SHOWN, HANDED_ON = _Shown(), _HandedOn()


def readings(context: FitContext, layer: Layer, what: Sequence[Method], batches: Batches) -> Iterator[list[Any]]:
    """For each batch what each reader found in the layer: the tensors of a `Cat` in a row, or another's value."""
    stack = Stack(tuple(reader.on(layers=layer.number) for reader in what))
    with context.attach(stack) as run:
        for batch in batches:
            run(**batch)
            found = [run[part][layer.number].value for part in stack]
            yield [torch.cat(list(x), -2).double() if isinstance(x, list | tuple) else x.double() for x in found]
            run.reset()
