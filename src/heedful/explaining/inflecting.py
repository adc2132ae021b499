"""In which layers maps are sharp and gradients die away: where a model that is tuned on would hardly change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adapters.choosing import adapter_for
from heedful.adapters.wrapped import unwrapped
from heedful.api import attach
from heedful.core.asked import asks
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.figures import Grid
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Mean
from heedful.core.summary import Summary, sums
from heedful.explaining.drawn import Told
from heedful.explaining.gradients import pulled

PAPER = Paper(
    "P297",
    "Attention Saturation and Gradient Suppression at Inflection Layers: Diagnosing and Mitigating Bottlenecks in "
    "Transformer Adaptation",
    "Wang Zixian",
    2025,
    "2511.00797",
    differs=(
        "Written from the abstract. How the author weighs sharp maps against dying gradients was not at hand: here "
        "both are told in standard deviations over the model's layers, and added.",
        "Gradients of parameters are those of the attention layer alone.",
        "Change of representations (delta CKA) is 1 less the diagonal of `likeness(before, after, batches).layers`: "
        "no basis of principal axes is shared. Adapters are the reader's own.",
    ),
)


@dataclass(frozen=True, eq=False, repr=False)
class Inflection(Told):
    """What a loss asks of each layer; means over batches."""

    entropy: Tensor  # [layers] nats, the mean over heads and queries: low where maps are saturated
    flow: Tensor  # [layers + 1] length of the loss's gradient in the stream, before the first layer and behind each
    weights: Tensor  # [layers] length of its gradient in the attention's parameters
    loss: float

    @property
    def decay(self) -> Tensor:
        """How much of the gradient is lost on its way back through each layer, as a logarithm `[layers]`."""
        return (self.flow[1:] / self.flow[:-1]).log()

    @property
    def score(self) -> Tensor:
        """How sharp a layer's maps are and how steeply gradients fall in it, in standard deviations, `[layers]`."""
        return _standard(self.decay) - _standard(self.entropy)

    @asks
    def top(self, count: int = 2) -> list[int]:
        """The inflection layers: those of the highest score, the highest first."""
        if count < 1:
            raise FieldError("Inflection.top()", "count", count, "must be 1 layer or more", 2)
        return self.score.argsort(descending=True, stable=True)[:count].tolist()

    @property
    def figure(self) -> Grid:
        what = "Sharp maps beside gradients that die away: in standard deviations over layers, and both added."
        values = torch.stack([-_standard(self.entropy), _standard(self.decay), self.score])
        rows = ["sharpness", "decay", "both"]
        columns = [str(n) for n in range(len(self.score))]
        return Grid("inflection", "Inflection layers", what, values, rows, columns, "", "layer", "deviations")

    def __repr__(self) -> str:
        found = zip(self.entropy.tolist(), self.decay.tolist(), self.score.tolist(), strict=True)
        rows = [f"loss {self.loss:.3f}; entropy, decay of gradients,", "and both in standard deviations, by layer"]
        rows += ["layer  entropy   decay    both"]
        rows += [
            f"{n:5}  {entropy:7.2f}  {decay:+6.2f}  {score:+6.2f}" for n, (entropy, decay, score) in enumerate(found)
        ]
        return "\n".join(rows)


class _Entropy(Method):
    """Of each layer, the mean over heads and over queries that are no padding."""

    @sums("entropy")
    def add_up(self, pattern: Summary, call: Call) -> Mean | None:
        if pattern.entropy is None:
            return None
        is_text = call.is_text.expand(pattern.entropy.shape)
        return Mean.of(pattern.entropy.detach().where(is_text, 0.0).sum().double(), float(is_text.sum()))


class _Begins(Method):
    """The stream as it enters the first layer, with its gradient to come."""

    @reads(Site.EMBEDDING)
    def keep(self, stream: Tensor, call: Call) -> Cat:
        return _kept(stream)


class _Leaves(Method):
    """The stream as it leaves each layer, with its gradient to come."""

    @reads(Site.RESIDUAL)
    def keep(self, stream: Tensor, call: Call) -> Cat:
        return _kept(stream)


@asks
def inflection(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, only: str | None = None) -> Inflection:
    """Layer by layer, how sharp a model's maps are on texts and how much of their loss's gradient comes back through.

    Batches have labels, or else their text is what is to be said. Give the texts that the model is to be tuned on:
    `top(2)` are the layers that would learn little of them, and where the paper puts adapters. A copy of the model is
    made; the model itself, and its gradients, stay as they are.
    """
    adapter_for(unwrapped(model), only)  # or the reason why there are no layers to tell apart
    copy = deepcopy(model).eval().requires_grad_(True)
    adapter = adapter_for(copy, only)
    modules = [adapter.model.get_submodule(name) for name in adapter.layer_names]
    readers = _Entropy(), _Begins(), _Leaves()
    entropies, flows, lengths, losses = [], [], [], []
    with attach(copy, readers[0] | readers[1] | readers[2], only=only) as run:
        for loss in pulled("inflection()", copy, run, batches):
            sharp, begins, leaves = (list(run[reader].values()) for reader in readers)
            if len(begins) != 1 or len(leaves) != len(modules):
                rule = "must name one stack of layers, each with one attention"
                raise FieldError("inflection()", "only", only, rule, "encoder")
            grads = [stat.value[0].grad for stat in begins + leaves]
            if any(grad is None for grad in grads):
                rule = "must hold token ids: no gradient reaches embeddings that ask for none"
                raise FieldError("inflection()", "batches", "inputs_embeds", rule, [{"input_ids": "..."}])
            entropies.append(torch.stack([stat.value for stat in sharp]))
            flows.append(torch.stack([grad.double().norm() for grad in grads]))
            lengths.append(torch.stack([_length(module) for module in modules]))
            losses.append(loss)
            run.reset()
    entropy, flow, weights = (torch.stack(each).mean(0).cpu() for each in (entropies, flows, lengths))
    return Inflection(entropy, flow, weights, sum(losses) / len(losses))


def _kept(stream: Tensor) -> Cat:
    if stream.requires_grad:
        stream.retain_grad()
    return Cat({"x": stream})  # not detached: a backward is to come


def _length(module: nn.Module) -> Tensor:
    """Of the gradients of all that a module has, together."""
    return torch.stack([p.grad.double().norm() for p in module.parameters() if p.grad is not None]).norm()


def _standard(x: Tensor) -> Tensor:
    """In standard deviations from the mean; all at it where they are one."""
    spread = x.std(correction=0)
    return (x - x.mean()) / spread if bool(spread > 0) else torch.zeros_like(x)
