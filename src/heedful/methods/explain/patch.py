"""heads_p = those of another run at the positions p: what a head's output there changes is what it was needed for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.kinds.weights import HeadWeights
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt
from heedful.core.sites import Site, at


class Patch(Method):
    """Puts what heads handed over in another run in place of what they hand over in this one, or zeros (ablation).

    `.on(layers, heads)` says which. `patching` and `path_patching` in `heedful.explaining` try the heads of a model one
    by one.
    """

    paper = Paper(
        "P055",
        "Circuit Component Reuse Across Tasks in Transformer Language Models",
        "Jack Merullo, Carsten Eickhoff, Ellie Pavlick",
        2023,
        "2310.08744",
        "ICLR 2024",
        differs=(
            "The authors trace their circuit back from the logits in several stages; here a stage is one call of "
            "path_patching with the receivers that the caller names.",
            "Path patching is Wang et al.'s (2211.00593): all other heads hold what they had, MLPs are computed anew.",
            "The repair of one task's circuit by attention that is set by hand is not here.",
        ),
    )
    values: Fitted | None = None  # <layer> [b|1 h n d] by text position; without it, or without a layer in it, zeros
    # text positions to put them in; None: all that there are values for
    positions: tuple[NonNegativeInt, ...] | None = None

    @classmethod
    def neutral(cls) -> Patch:
        return cls(positions=())

    @classmethod
    def example(cls) -> Patch:
        return cls(positions=(0, 3, 6))

    def idle(self, call: Call) -> bool:
        return self.positions == ()

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights | None:
        if self.positions == ():
            return weights
        gone = self.positions is None and (self.values is None or str(layer.number) not in self.values)
        return replace(weights, o=torch.zeros_like(weights.o)) if gone else None  # weights know no text

    @at(Site.HEAD_OUTPUT)
    def put(self, heads: Tensor, call: Call) -> Tensor:
        return patched(heads, call.q_pos, self.values, self.positions, call)


def patched(
    x: Tensor, position: Tensor, values: Fitted | None, positions: tuple[int, ...] | None, call: Call
) -> Tensor:
    """`x [b h n d]`, whose tokens stand at `position [b|1 g|1 n]`, with another run's values in it."""
    place = position[:, :1]
    here = place >= 0  # padding stays as it is
    if positions is not None:
        here = here & torch.isin(place, torch.tensor(positions, dtype=place.dtype, device=place.device))
    source = torch.zeros_like(x)
    if values is not None and (found := values.get(str(call.layer))) is not None:
        requested = (*x.shape[1:2], *x.shape[3:])
        if found.ndim != 4 or (found.shape[1], found.shape[3]) != requested or found.shape[0] not in (1, len(x)):
            rule = f"layer {call.layer} has [b h n d] = {list(x.shape)} and the values {list(found.shape)}"
            raise FieldError("Patch", "values", values, rule, "values of a run of the same model and batch")
        here = here & (place < found.shape[2])
        index = place.clamp(0, found.shape[2] - 1)[..., None].expand(len(x), x.shape[1], -1, x.shape[3])
        source = found.to(x).expand(len(x), -1, -1, -1).gather(2, index)
    return source.where(here[..., None], x)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("Paris is the capital of", return_tensors="pt")
    for layer in range(0, 30, 6):
        with attach(model, Patch().on(layers=layer)) as run:
            print(layer, run.difference(**text))
