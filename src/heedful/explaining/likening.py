"""How alike two models are inside: single neurons by correlation, layers by their subspaces, heads by their maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heedful.adapters.wrapped import unwrapped
from heedful.api import attach, still
from heedful.core.asked import asks
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.figures import Grid
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.explaining.drawn import Told
from heedful.explaining.states import STREAMS, named

PAPER = Paper(
    "P124",
    "Speech Representation Analysis based on Inter- and Intra-Model Similarities",
    "Yassine El Kheir, Ahmed Ali, Shammur Absar Chowdhury",
    2024,
    "2406.16099",
    "ICASSP 2024 Workshops",
    differs=(
        "Of the authors' measures of layers linear CKA alone, and of heads the correlation row by row; their CCA, "
        "regression, distances by Frobenius's norm and by Jensen and Shannon's divergence are not here.",
        "A row's correlation is over the tokens that it may see in either model; rows that see one are left out.",
        "A layer's states are the residual stream as it leaves the layer.",
    ),
)
LEVEL = Literal["neurons", "layers", "heads"]
LEVELS: tuple[LEVEL, ...] = ("neurons", "layers", "heads")
WHAT = {
    "neurons": "How well some neuron of the other model's layer follows a neuron, the best for each and their mean.",
    "layers": "How alike the geometry of all tokens is in two layers (linear CKA), however it is turned.",
    "heads": "How well some head of the other model's layer looks where a head does, the best for each and their mean.",
}
STILL = 1e-6  # spread of a row's weights or of a neuron, over its size, from which on it is taken for one


@dataclass(frozen=True, eq=False, repr=False)
class Likeness(Told):
    """How alike each layer of one model is to each of another, `[layers other's layers]`; 1 is the same.

    Neurons and heads are sought in the other model for each of the first one's; the other way round may differ.
    """

    neurons: Tensor
    layers: Tensor
    heads: Tensor

    @asks
    def best(self, level: LEVEL) -> Tensor:
        """Each layer's likeness to that layer of the other model which is likest, `[layers]`."""
        found: Tensor = getattr(self, level)
        return found.amax(1)

    @property
    def figures(self) -> tuple[Grid, ...]:
        """A grid for each of neurons, layers and heads."""
        made = []
        for level in LEVELS:
            values: Tensor = getattr(self, level)
            rows, columns = ([str(n) for n in range(size)] for size in values.shape)
            what = f"{WHAT[level]} 1 is the same."
            made.append(
                Grid(f"alike-{level}", f"Likeness of {level}", what, values, rows, columns, "layer", "of the other")
            )
        return tuple(made)

    @property
    def figure(self) -> Grid:
        """Layers by their subspaces."""
        return self.figures[1]

    def __repr__(self) -> str:
        rows = ["likeness to the other model's likest layer, mean over layers (of equal depth):"]
        n = min(self.layers.shape)
        for level in LEVELS:
            equal = getattr(self, level).diagonal()[:n].mean()
            rows.append(f"  {level:8} {float(self.best(level).mean()):.2f} ({float(equal):.2f})")
        return "\n".join(rows)


@asks
def likeness(
    model: nn.Module,
    other: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    only: str | None = None,
) -> Likeness:
    """How alike two models, or the layers of one, are on inputs that both take, token by token.

    States of all tokens are kept until the end: a few thousand of them tell enough. `only` names the part of both that
    is compared, such as "model.encoder".
    """
    for which in (model, other):
        unwrapped(which)  # or the reason why there is no model in it
    states: tuple[list[list[Tensor]], ...] = ([], [])
    heads: list[list[Tensor]] = []
    rows = 0
    for batch in named("likeness()", batches):
        (one, mine), (two, theirs) = (_seen(which, batch, only) for which in (model, other))
        if one[0].shape[0] != two[0].shape[0] or mine[0].shape[2:] != theirs[0].shape[2:]:
            rule = f"reads {len(two[0])} tokens where the model reads {len(one[0])}; both must read the same"
            raise FieldError("likeness()", "other", type(other).__name__, rule, "a model with the same tokens")
        found, count = _together(mine, theirs)
        heads = [[a + b for a, b in zip(*row, strict=True)] for row in zip(heads, found, strict=False)] or found
        rows += count
        states[0].append(one)
        states[1].append(two)
    firsts, seconds = ([torch.cat(layer) for layer in zip(*kept, strict=True)] for kept in states)
    pairs = [[alike(x, y) for y in seconds] for x in firsts]
    neurons, layers = (torch.tensor([[pair[i] for pair in row] for row in pairs]) for i in (0, 1))
    looks = [[float((total / max(1, rows)).amax(1).mean()) for total in row] for row in heads]
    return Likeness(neurons, layers, torch.tensor(looks))


def alike(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Of states `[tokens e]`: the mean over neurons of the highest correlation with any other, and linear CKA."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    shared = x.mT @ y
    sizes = [z.norm(dim=0) for z in (x, y)]
    alive = [size > STILL * size.amax() for size in sizes]
    correlation = torch.where(alive[0][:, None] & alive[1], shared / (sizes[0][:, None] * sizes[1]), 0.0).abs()
    cka = shared.square().sum() / ((x.mT @ x).norm() * (y.mT @ y).norm())
    return float(correlation.amax(1).mean()), float(cka)


class _Maps(Method):
    """Each layer's map, with rows of padding at zero."""

    @reads(Site.PATTERN)
    def keep(self, weights: Tensor, call: Call) -> Cat:
        return Cat.of("x", weights.float() * call.is_text[..., None])


def _seen(model: nn.Module, batch: Mapping[str, Any], only: str | None) -> tuple[list[Tensor], list[Tensor]]:
    """States `[tokens e]` and maps `[b h q k]` of each layer."""
    reader = STREAMS | _Maps()
    with torch.no_grad(), still(model), attach(model, reader, only=only, backend="reference") as run:
        run(**batch)
        readings = run[STREAMS], run[_Maps()]
    states, maps = ([stat.value[0] for stat in found.values()] for found in readings)
    return states, maps


def _together(mine: list[Tensor], theirs: list[Tensor]) -> tuple[list[list[Tensor]], int]:
    """For two layers each, the correlations of their heads `[h h]` added up over rows; and how many rows there are."""
    seen = torch.stack([(layer > 0).any(1) for layer in (*mine, *theirs)]).any(0)  # [b q k]
    seen &= seen.sum(-1, keepdim=True) > 1
    ones, others = ([_standard(layer, seen) for layer in maps] for maps in (mine, theirs))
    return [[x @ y.mT for y in others] for x in ones], int(seen.any(-1).sum())


def _standard(maps: Tensor, seen: Tensor) -> Tensor:
    """Rows of maps `[b h q k]` at mean 0 and length 1 over what they see, `[h b*q*k]`; those that are even are zero."""
    keep = seen[:, None].to(maps.dtype).double()
    mean = (maps * keep).sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)
    x = (maps - mean) * keep
    size = x.norm(dim=-1, keepdim=True)
    x = torch.where(size > STILL * mean, x / size, 0.0)
    return x.transpose(0, 1).flatten(1)
