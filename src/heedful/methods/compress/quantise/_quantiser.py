"""What methods share that round a layer's projections: which of them, in which layers, and back into the weights."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import field, replace

from torch import Tensor

from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.core.kinds.weights import HeadWeights, Surgery

LETTERS = "qkvo"


class Quantiser(Surgery, abstract=True):
    """Rounds projections to few values, which are written back as ordinary numbers: the model is as large as before.

    A simulation: it shows what the bits cost in quality, and saves no memory. Biases stay.
    """

    projections: str = field(default=LETTERS, kw_only=True)  # which projections: letters of "qkvo"
    layers: tuple[int, ...] | None = field(default=None, kw_only=True)  # in which layers; None: all

    def __post_init__(self) -> None:
        if not set(self.projections) <= set(LETTERS) or len(set(self.projections)) < len(self.projections):
            raise FieldError(self, "projections", self.projections, "must be some of the letters 'qkvo'", "qk")
        if self.layers is not None and min(self.layers, default=0) < 0:
            raise FieldError(self, "layers", self.layers, "must be numbers from 0 up", (0, 1))

    def require_depth(self, depth: int) -> None:
        if max(self.layers or (), default=0) >= depth:
            raise FieldError(self, "layers", self.layers, f"must be of the model's {depth} layers", (depth - 1,))

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        if not self.projections or (self.layers is not None and layer.number not in self.layers):
            return weights
        return written(weights, self.rounded({x: matrix(weights, x) for x in self.projections}, weights, layer))

    @abstractmethod
    def rounded(self, matrices: dict[str, Tensor], weights: HeadWeights, layer: Layer) -> dict[str, Tensor]:
        """What is written in place of the matrices `[o i]`, by their letters."""


def matrix(weights: HeadWeights, letter: str) -> Tensor:
    """One projection, `[o i]`."""
    found: Tensor = getattr(weights, letter)
    return found.flatten(1) if letter == "o" else found.flatten(0, 1)


def written(weights: HeadWeights, matrices: dict[str, Tensor]) -> HeadWeights:
    """The weights with these projections, `[o i]` each."""
    shaped = {letter: x.to(old).view_as(old) for letter, x in matrices.items() for old in [getattr(weights, letter)]}
    return replace(weights, **shaped)
