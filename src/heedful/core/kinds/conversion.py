"""What teaches a copy of a model another attention, and how far that has come."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from heedful.core.entry import CatalogueEntry
from heedful.core.errors import FieldError
from heedful.core.kinds.weights import Surgery
from heedful.core.method import Part, Stack, as_stack
from heedful.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat
from heedful.core.sites import Site


@dataclass(frozen=True)
class Progress:
    """How far something is that takes its time."""

    stage: str  # what is being done, such as "layers" or "whole" of a conversion
    done: int  # steps of this stage, or tokens, shards, answers
    total: int
    note: str = ""


Report = Callable[[Progress], None]


class Conversion(CatalogueEntry, abstract=True):
    """Teaches a copy of a model another attention: `run = heedful.fit(it, model, batches)` is that copy under it.

    First each layer by itself, shown what the model's own layer is shown; then the copy as a whole.
    """

    kind = "conversion"
    handed_to = "heedful.fit()"
    target: Part | Stack = field(default_factory=Stack)  # what acts in the copy, in the layers that it is for
    surgery: Surgery | None = None  # what is done to the copy's weights before: fewer key heads, for instance
    layer_epochs: NonNegativeInt = 1  # passes over the batches in which each layer learns by itself
    epochs: NonNegativeInt = 1  # passes in which the copy learns as a whole
    layer_rate: PositiveFloat = 1e-3  # Adam's learning rate for single layers
    rate: PositiveFloat = 1e-4  # Adam's learning rate for the whole
    features: NonNegativeFloat = (
        0.0  # weight of staying near the model's stream while the whole is taught; 0: not asked for
    )

    def __post_init__(self) -> None:
        if any(e.site is Site.HIDDEN and not e.reads for m in as_stack(self.target).methods for e in m.edits):
            rule = "edits HIDDEN, and what a layer is shown is the model's own while it learns by itself"
            raise FieldError(self, "target", self.target, rule, "GatedHeads(fine_tune=True)")

    @abstractmethod
    def of_layer(self, found: Tensor, wanted: Tensor) -> Tensor:
        """How far what a layer's attention gives is from what the model's own gives, `[n e]` each: a number."""

    @abstractmethod
    def of_whole(self, found: Tensor, wanted: Tensor) -> Tensor:
        """How far logits are from the model's own, `[n v]` each: a number."""

    @abstractmethod
    def of_stream(self, found: Tensor, wanted: Tensor) -> Tensor:
        """How far the stream after a layer is from the model's own, `[n e]` each: a number."""
