"""Where in a model's attention texts pull at its weights: gradients of their loss, head by head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from heedful.adapters.choosing import adapter_for
from heedful.adapters.projections import projections
from heedful.adapters.weights import read_weights
from heedful.adapters.wrapped import unwrapped
from heedful.core.asked import asks
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.figures import Grid
from heedful.core.paper import Paper
from heedful.explaining.drawn import Told
from heedful.explaining.states import named
from heedful.kit.labels import labelled

PAPER = Paper(
    "P116",
    "Localizing Paragraph Memorization in Language Models",
    "Niklas Stoehr, Mitchell Gordon, Chiyuan Zhang, Owen Lewis",
    2024,
    "2403.19851",
    differs=(
        "The projections of attention alone; the authors take those of the feed-forward part too.",
        "Each batch has a gradient of its own, and their sizes are averaged; the authors give one batch of 50 "
        "paragraphs, whose gradients cancel where they disagree.",
        "Gradients are those of the weights as the model has them; the authors' are of weights that a norm's gains "
        "were multiplied into, and whose output is centred, as TransformerLens loads models.",
        "Their contrastive objective, unlearning by the largest gradients, perturbed prefixes, and the correlation of "
        "a head's attention with how rare tokens are, are not here.",
    ),
)
NAMES = ("queries", "keys", "values", "output")


@dataclass(frozen=True, eq=False, repr=False)
class WeightGradients(Told):
    """Sizes of gradients, each `[layers h]` by projection; keys and values have as many heads as the model has."""

    total: Mapping[str, Tensor]  # sums of magnitudes
    peak: Mapping[str, Tensor]  # largest magnitudes, which the authors draw
    loss: float  # the mean over batches

    @property
    def by_layer(self) -> Tensor:
        """The sum of magnitudes in each layer, `[layers]`."""
        return torch.stack([x.nansum(1) for x in self.total.values()]).sum(0)

    @property
    def share(self) -> Tensor:
        """Which share of all that each layer has, `[layers]`: where texts pull, however hard."""
        return self.by_layer / self.by_layer.sum()

    @property
    def depth(self) -> float:
        """Where the middle of that lies, from 0 in the first layer to 1 in the last."""
        places = torch.linspace(0, 1, len(self.share), dtype=self.share.dtype)
        return float((self.share * places).sum())

    @property
    def figure(self) -> Grid:
        names = [f"{name} {h}" for name in NAMES for h in range(self.peak[name].shape[1])]
        values = torch.cat([self.peak[name] for name in NAMES], 1)
        what = "The largest gradient of the texts' loss in each head's weights: where the model would change for them."
        rows = [str(n) for n in range(len(values))]
        return Grid("gradients", "Gradients of weights", what, values, rows, names, "layer", "head", log=True)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {float(x.nansum() / self.by_layer.sum()):.0%}" for name, x in self.total.items())
        layers = ", ".join(f"{n}: {share:.0%}" for n, share in enumerate(self.share.tolist()))
        return f"loss {self.loss:.3f}; gradients by projection {parts}; by layer {layers}"


@asks
def weight_gradients(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, only: str | None = None
) -> WeightGradients:
    """How large the gradient of each batch's loss is in the weights of each head, the mean over batches.

    Batches have labels, or else their text is what is to be said; a label of -100 leaves a token out, as of a prefix.
    What a model knows by heart pulls at other layers than what it does not: give texts one by one, each a batch, and
    compare the shares. A copy of the model is made; the model itself, and its gradients, stay as they are.
    """
    adapter = adapter_for(unwrapped(model), only)
    for number, name in enumerate(adapter.layer_names):
        projections(adapter.model, name, number)  # or the reason why heads cannot be told apart
    copy = deepcopy(model).eval().requires_grad_(True)
    totals: list[dict[str, Tensor]] = []
    peaks: list[dict[str, Tensor]] = []
    losses = []
    for loss in pulled("weight_gradients()", copy, copy, batches):
        losses.append(loss)
        total, peak = _sizes(copy, only)
        totals.append(total)
        peaks.append(peak)
    mean = [{name: torch.stack([x[name] for x in each]).mean(0) for name in NAMES} for each in (totals, peaks)]
    return WeightGradients(mean[0], mean[1], sum(losses) / len(losses))


def pulled(
    verb: str, copy: nn.Module, asked: Callable[..., Any], batches: Iterable[Mapping[str, Any]]
) -> Iterator[float]:
    """The loss of each batch, as it is asked for, while the copy of the model has that loss's gradients."""
    for batch in named(verb, batches):
        copy.zero_grad()
        with torch.enable_grad():
            loss = getattr(asked(**labelled(batch)), "loss", None)
        if loss is None:
            raise RefusedModel(f"{type(copy).__name__} gives no loss of these inputs; add labels that it takes")
        if not loss.isfinite():
            rule = "must have a loss that is a number, which labels of -100 alone have not"
            raise FieldError(verb, "batches", float(loss.detach()), rule, [{"input_ids": "..."}])
        loss.backward()
        yield float(loss.detach())


def _sizes(copy: nn.Module, only: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums of magnitudes of the gradients that a copy has, and the largest, `[layers h]` by projection."""
    kept = [(p, p.data) for p in copy.parameters()]
    for p, data in kept:  # heads are told apart in gradients as in the weights that they are of
        p.data = torch.zeros_like(data) if p.grad is None else p.grad
    adapter = adapter_for(copy, only)
    layers = []
    with torch.no_grad():
        for number, name in enumerate(adapter.layer_names):
            found = read_weights(projections(adapter.model, name, number))
            layers.append([found.q, found.k, found.v, found.o.transpose(0, 1)])
        sizes = [[(x.double().abs().sum((1, 2)), x.double().abs().amax((1, 2))) for x in layer] for layer in layers]
    for p, data in kept:
        p.data = data
    pooled = []
    for which in (0, 1):
        rows = [[part[which] for part in layer] for layer in sizes]
        columns = zip(NAMES, zip(*rows, strict=True), strict=True)
        pooled.append({name: pad_sequence(list(column), True, float("nan")) for name, column in columns})
    return pooled[0], pooled[1]
