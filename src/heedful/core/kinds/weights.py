"""A model's weights head by head, and what edits or measures them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor

from heedful.core.entry import CatalogueEntry, FitContext, Layer
from heedful.core.errors import StatisticError
from heedful.core.figures import Description
from heedful.core.fitted import Fitted
from heedful.core.method import Part


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """One layer's projections, head by head, whatever modules hold them."""

    q: Tensor  # [h d e]
    k: Tensor  # [g d e]
    v: Tensor  # [g d e]
    o: Tensor  # [e h d]
    q_bias: Tensor | None = None  # [h d]
    k_bias: Tensor | None = None  # [g d]
    v_bias: Tensor | None = None  # [g d]
    o_bias: Tensor | None = None  # [e]
    stream: Tensor | None = None  # [e], a constant that an edit adds to the stream as it leaves the layer

    @property
    def heads(self) -> int:
        return self.q.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[0]

    def keep_groups(self, groups: tuple[int, ...]) -> HeadWeights:
        """Only these key heads, each with its query heads."""
        size = self.heads // self.kv_heads
        heads = [g * size + i for g in groups for i in range(size)]
        kv = list(groups)

        def pick(x: Tensor | None, rows: list[int]) -> Tensor | None:
            return None if x is None else x[rows]

        return HeadWeights(
            self.q[heads], self.k[kv], self.v[kv], self.o[:, heads],
            pick(self.q_bias, heads), pick(self.k_bias, kv), pick(self.v_bias, kv), self.o_bias, self.stream,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a model knows of its tokens: the vector each comes in as, and the one its logit is a product with."""

    embedding: Tensor  # [v e]
    unembedding: Tensor  # [v e]


class Surgery(CatalogueEntry, abstract=True):
    """Edits weights offline."""

    kind = "surgery"
    handed_to = "heedful.operate()"

    @abstractmethod
    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        """The layer's new weights; the same object where nothing changes."""

    def require_depth(self, depth: int) -> None:
        """Refuse a model of so many layers, where others are named; `operate` would never see those."""


class Weights(CatalogueEntry, abstract=True):
    """Measures a model's weights alone: `found = heedful.fit(it, model, ())`, then `found.describe()`."""

    kind = "weights"
    handed_to = "heedful.fit()"
    fitted: Fitted | None = field(default=None, kw_only=True)

    @property
    def found(self) -> Fitted:
        """What was fitted; refused where nothing was."""
        if self.fitted is None:
            raise StatisticError(f"{self!r} has seen no weights: heedful.fit({type(self).__name__}(), model, ())")
        return self.fitted

    @abstractmethod
    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]] = ()) -> Self:
        """The same with what it found as `fitted`."""

    @abstractmethod
    def describe(self) -> Description:
        """What of it is worth a figure, a role or a sentence."""


Measure = Part | Weights
