"""Token t is a secondary sink in layer l if |cos(x_t, x_0)| > 0.9 on its way in, x_0 being a sink, for 5 layers on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.entry import Readings
from heedful.core.figures import Curves, Description, Finding, Listing, layers_from, percent
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat, PositiveInt, ProperShare
from heedful.core.sites import Site, reads
from heedful.core.stats import Statistic, Sum
from heedful.core.summary import Summary, sums
from heedful.kit.pieces import added


@dataclass(frozen=True)
class Level:
    """Sinks that arise after the same layer and last equally long."""

    born: int  # the layer after which they point where the first token does
    lasts: int  # in how many layers' attention they do
    number: float  # of tokens a text


@dataclass(frozen=True, eq=False)
class Secondary:
    """Sinks beside the first token: how many, where they arise, how long they last, what they get."""

    counts: Mapping[int, Tensor] = field(repr=False)  # layer -> [born]: tokens a text aligned on their way into it
    weight: Mapping[int, float] = field(repr=False)  # mean weight on each of them; nan without any
    norm: Mapping[int, float] = field(repr=False)  # their mean norm; nan without any
    first_weight: Mapping[int, float] = field(repr=False)
    first_norm: Mapping[int, float] = field(repr=False)
    least: int

    @cached_property
    def levels(self) -> list[Level]:
        """The kinds of sinks, most frequent first; those that go before `least` layers are noise."""
        found = []
        counts = {n: x.tolist() for n, x in self.counts.items()}
        for born in range(max(counts, default=0)):
            for layer in (n for n in counts if n >= born + self.least):
                number = counts[layer][born] - (counts[layer + 1][born] if layer + 1 in counts else 0)
                if number > 1e-9:  # what rounding leaves of equal shares is no sink
                    found.append(Level(born, layer - born, number))
        return sorted(found, key=lambda level: -level.number)

    @property
    def by_layer(self) -> dict[int, float]:
        """Secondary sinks a text in each layer's attention, without noise."""
        return {
            n: sum(level.number for level in self.levels if level.born < n <= level.born + level.lasts)
            for n in self.counts
        }

    def __str__(self) -> str:
        told = "; ".join(f"{x.number:.2g} a text after layer {x.born} for {x.lasts} layers" for x in self.levels[:6])
        return f"secondary sinks: {told or 'none'}"


class SecondarySinks(Method):
    """Tokens in the text that take on the direction of the first one for some layers, and draw attention there."""

    paper = Paper(
        "P032",
        "On the Existence and Behaviour of Secondary Attention Sinks",
        "Jeffrey T. H. Wong, Cheng Zhang, Louis Mahon, Wayne Luk, Anton Isopoussu, Yiren Zhao",
        2025,
        "2512.22213",
        differs=(
            "The authors look at the layers from the first token's steepest rise in norm to its steepest fall, which "
            "are known after the pass only; here a layer counts where its norm is `primary` times the median.",
            "The first token is the reference; the authors take the strongest of the first two or three.",
            "The authors call a token primary too if it lasts for all layers but 15; here every token but the first "
            "is secondary, and its lifetime tells.",
            "The state after the last layer is not looked at: no attention reads it.",
            "A token that turns away and comes back is two sinks, each as long as its stretch; the authors add up all "
            "layers in which it is one.",
            "A text may come in several calls, each going on where the last one ended; one-token decoding steps, and "
            "what follows them, are not counted.",
        ),
    )
    near: ProperShare = 0.9  # absolute cosine to the first token, strictly above; the authors' default
    least: PositiveInt = 5  # layers that a sink lasts at least; the authors' default
    primary: PositiveFloat = 3.0  # norm of the first token over the median one, from which on it is a sink itself

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE

    @sums("received")
    def weigh(self, pattern: Summary, call: Call) -> Statistic | None:
        """What the layer gives to the tokens that `align` found before it, by the layer after which they arose."""
        below, kept = self._below(call), call.state.cache
        if below is None or call.cross or pattern.received is None or pattern.seen is None:
            return None
        n = below[0].shape[-1]
        total, count = torch.broadcast_tensors(*map(call.keys.by_position, (pattern.received, pattern.seen)))
        if (text := added(call, "weights", total=total[..., :n], count=count[..., :n])) is None:
            return None
        earlier, now = text
        counted = _counted((now["total"] / now["count"].clamp(min=1)).mean(1), *below, call.depth)
        # a later piece may tell otherwise of earlier tokens, so the text is counted anew
        new = counted if earlier is None else counted - kept["counted"]
        kept["counted"] = counted
        return Sum.of(new.sum(0))

    @reads(Site.RESIDUAL)
    def align(self, stream: Tensor, call: Call) -> None:
        """Find the tokens that run parallel to a first one that is a sink, and leave them for the next layer."""
        stream = stream.detach()
        is_text, position = (x[:, 0].expand(len(stream), -1) for x in (call.is_text, call.q_pos))
        first = (position == 0) & is_text
        leads = stream[torch.arange(len(stream), device=stream.device), first.int().argmax(-1)]  # [b e]
        if (lead := added(call, "lead", x=leads.where(first.any(-1, keepdim=True), 0.0))) is None:
            return
        x, norm = lead[1]["x"], stream.norm(dim=-1)  # [b e], [b n]
        top = x.norm(dim=-1, keepdim=True)
        cosine = (stream @ x[..., None])[..., 0] / (norm * top)
        found = {"norm": norm, "near": (cosine.abs() > self.near).to(norm.dtype), "is_text": torch.ones_like(norm)}
        by_place = {name: call.queries.by_position(x.where(is_text, 0.0)[:, None])[:, 0] for name, x in found.items()}
        if (text := added(call, "tokens", **by_place)) is None:
            return
        norm, near, here = (text[1][name] for name in found)  # [b k]
        median = norm.masked_fill(here == 0, float("nan")).nanmedian(-1, keepdim=True).values
        aligned = (near > 0) & (top > self.primary * median) & (here[:, :1] > 0)
        born, below = torch.full_like(norm, call.layer, dtype=torch.long), self._below(call)
        if below is not None:
            born = below[0].where(below[0] >= 0, born)
        call.state.forward["state"] = call.layer, (born.where(aligned, -1), norm, here)

    def _below(self, call: Call) -> tuple[Tensor, Tensor, Tensor] | None:
        """Of each token so far `[b k]`: aligned since which layer (-1: it is not), its norm, 1 where there is one."""
        layer, state = call.state.forward.get("state", (None, None))
        return state if layer == call.below else None

    def answer(self, readings: Readings) -> Secondary:
        totals = {n: stat.value for n, stat in readings.items()}
        others = {n: x[0].sum(-1) for n, x in totals.items()}
        return Secondary(
            {n: x[0, 0] / x[1, 0, 0] for n, x in totals.items()},
            {n: float(x[1] / x[0]) for n, x in others.items()},
            {n: float(x[2] / x[0]) for n, x in others.items()},
            {n: float(x[1, 1, 0] / x[1, 0, 0]) for n, x in totals.items()},
            {n: float(x[1, 2, 0] / x[1, 0, 0]) for n, x in totals.items()},
            self.least,
        )

    def describe(self, answer: Secondary) -> Description:
        layers = list(answer.counts)
        number = Curves(
            "secondary_sinks",
            "Secondary sinks",
            "How many tokens beside the first act as sinks in each layer: for a stretch of layers they point where the "
            "first token does.",
            x=layers,
            lines={"tokens a text": torch.tensor(list(answer.by_layer.values()))},
            x_label="layer",
            y_label="tokens a text",
            folded=True,
        )
        levels = answer.levels
        if not levels:
            return Description((number,))
        weight = Curves(
            "secondary_weight",
            "Attention on sinks",
            "The mean weight that the first token gets, and each token that runs parallel to it.",
            x=layers,
            lines={
                "first token": torch.tensor(list(answer.first_weight.values())),
                "each parallel token": torch.tensor(list(answer.weight.values())),
            },
            x_label="layer",
            y_label="mean weight",
            folded=True,
        )
        listing = Listing(
            "sink_levels",
            "Levels of secondary sinks",
            "Where secondary sinks arise and in how many layers they draw attention.",
            columns=("after layer", "lasts layers", "tokens a text"),
            rows=[(x.born, x.lasts, round(x.number, 2)) for x in levels[:12]],
        )
        where = [n for n, x in answer.by_layer.items() if x > 0]
        top = max(where, key=lambda n: answer.by_layer[n])
        text = (
            f"In {layers_from(where[0], where[-1])} there are secondary sinks, tokens beside the first (up to "
            f"{answer.by_layer[top]:.1f} a text, layer {top}); each gets {percent(answer.weight[top])} of the "
            f"attention there, the first token {percent(answer.first_weight[top])}."
        )
        finding = Finding(text, 0.3 + 0.3 * min(1.0, answer.by_layer[top]), ("ACT",), "secondary_sinks")
        return Description((number, weight, listing), findings=(finding,))


def _counted(weight: Tensor, born: Tensor, norm: Tensor, here: Tensor, depth: int) -> Tensor:
    """Of each text's other tokens by birth `[b 0 ...]`, and of its first `[b 1 ... 0]`: number, weights and norms."""
    found = weight.new_zeros(len(born), 2, 3, depth, dtype=torch.float64)
    others = (born >= 0) & (torch.arange(born.shape[-1], device=born.device) > 0)
    for i, x in enumerate((here, weight, norm)):
        found[:, 0, i].scatter_add_(-1, born.clamp(min=0), x.where(others, 0.0).double())
        found[:, 1, i, 0] = x[:, 0]
    return found


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 5, return_tensors="pt")
    with attach(model, SecondarySinks()) as run:
        run(**text)
        print(run[SecondarySinks()])
    for finding in SecondarySinks().describe(run[SecondarySinks()]).findings:
        print(finding.text)
