"""M_hd = norm over tokens of dimension d of head h's queries (keys); massive where M_hd > 5 mean_d M_hd."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.entry import Readings
from heedful.core.figures import Description, Finding, HeadMap, Listing, percent
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Mean, Statistic
from heedful.kit.rotary import periods


@dataclass(frozen=True, eq=False)
class Massive:
    """How each head's queries and keys spread over their dimensions."""

    query: Mapping[int, Tensor] = field(repr=False)  # layer -> [h d]: over the head's mean dimension
    key: Mapping[int, Tensor] = field(repr=False)  # layer -> [h d], each key head repeated for its query heads
    period: Mapping[int, Tensor] = field(repr=False)  # layer -> [d]: tokens a full turn takes; inf: none; nan: unknown
    times: float

    @property
    def query_ratio(self) -> Tensor:
        """The largest dimension over the mean one, `[layers h]`."""
        return torch.stack([x.amax(-1) for x in self.query.values()])

    @property
    def key_ratio(self) -> Tensor:
        return torch.stack([x.amax(-1) for x in self.key.values()])

    def dimensions(self, side: Mapping[int, Tensor]) -> Counter[int]:
        """In how many heads each dimension is massive."""
        return Counter(int(d) for x in side.values() for d in (x > self.times).nonzero()[:, 1])

    def turns(self, dimension: int) -> tuple[Tensor, Tensor]:
        """Where a dimension is massive, of each layer that shows it: its period, and which share have longer ones."""
        sides = self.query, self.key
        layers = [n for n in self.query if any(bool((x[n][:, dimension] > self.times).any()) for x in sides)]
        found = torch.stack([self.period[n] for n in layers])
        found = found[~found[:, dimension].isnan()]
        own = found[:, dimension, None]
        return own[:, 0], (found > own).double().mean(-1)

    def __str__(self) -> str:
        told = []
        for name, side in (("queries", self.query), ("keys", self.key)):
            most = ", ".join(f"{d} ({n} heads)" for d, n in self.dimensions(side).most_common(4))
            told.append(f"massive dimensions of {name}: {most or 'none'}")
        return "; ".join(told)


class MassiveQK(Method):
    """Whether few dimensions of queries and keys hold most of their size, and how fast these turn with position."""

    paper = Paper(
        "P180",
        "Massive Values in Self-Attention Modules are the Key to Contextual Knowledge Understanding",
        "Mingyu Jin, Kai Mei, Wujiang Xu, Mingjie Sun, Ruixiang Tang, Mengnan Du, Zirui Liu, Yongfeng Zhang",
        2025,
        "2502.01563",
        "ICML 2025",
        differs=(
            "Queries and keys alone; the paper's values, which show no such pattern, are compared in the claim.",
            "The mean is over the dimensions of one head.",
            "The paper's disruption, which puts the mean in place of massive dimensions, is not part of the measure.",
        ),
    )
    one_text = True
    # times the head's mean dimension; the paper's default
    times: Annotated[float, Gt(1)] = 5.0

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or call.cross

    @reads(Site.QUERY)
    def look(self, query: Tensor, call: Call) -> None:
        """Leave the queries for `measure`, which has the keys."""
        call.state.forward["query"] = query.detach()

    @reads(Site.KEY)
    def measure(self, key: Tensor, call: Call) -> Statistic | None:
        query: Tensor = call.state.forward.pop("query")
        n, is_text = query.shape[2], call.is_text[..., None].to(query.dtype)
        fresh = key.detach()[:, :, -n:]  # what the cache held is counted already
        q, k = (_squares(x * is_text if call.queries.is_filled is not None else x) for x in (query, fresh))
        turns = periods(call, q.shape[-1])  # its own in each layer: some models turn windows faster than the rest
        turns, known = (q.new_zeros(1), 0) if turns is None else (turns.to(q), len(query))
        tokens = int(call.is_text.expand(len(query), 1, n).sum())
        # a mean over texts of what is the same in all of them lets the periods travel along
        total = torch.stack([q, k.repeat_interleave(len(q) // len(k), 0), (known * turns).expand_as(q)])
        return Mean.of(total, q.new_tensor([tokens, tokens, known])[:, None, None])

    def answer(self, readings: Readings) -> Massive:
        sizes = {n: stat.value[:2].sqrt() for n, stat in readings.items()}
        shares = {n: x / x.mean(-1, keepdim=True) for n, x in sizes.items()}
        turns = {n: stat.value[2, 0] for n, stat in readings.items()}
        return Massive({n: x[0] for n, x in shares.items()}, {n: x[1] for n, x in shares.items()}, turns, self.times)

    def describe(self, answer: Massive) -> Description:
        layers = list(answer.query)
        maps = tuple(
            HeadMap(
                f"massive_{name}",
                f"Largest dimension of each head's {name}",
                f"How many times the mean dimension the largest one is; above {self.times:g} it is called massive.",
                layers=layers,
                values=ratio,
                unit="",
                low=1.0,
            )
            for name, ratio in (("queries", answer.query_ratio), ("keys", answer.key_ratio))
        )
        in_query, in_key = answer.dimensions(answer.query), answer.dimensions(answer.key)
        both = in_query + in_key
        turns = not all(bool(x.isnan().all()) for x in answer.period.values())
        what = "Dimensions of a head that are massive in most heads"
        rows = [(d, _wave(answer, d), in_query[d], in_key[d]) for d, _ in both.most_common(12)]
        listing = Listing(
            "massive_dimensions",
            "Massive dimensions",
            f"{what}, with their RoPE wavelengths in tokens: the long ones tell little of position."
            if turns
            else f"{what}.",
            columns=("dimension", *("RoPE wavelength",) * turns, "heads, queries", "heads, keys"),
            rows=[(d, *(wave,) * turns, *many) for d, wave, *many in rows],
        )
        return Description((*maps, listing) if both else maps, findings=(self._finding(answer, both),))

    def _finding(self, answer: Massive, both: Counter[int]) -> Finding:
        share = float(((answer.query_ratio > self.times) | (answer.key_ratio > self.times)).double().mean())
        if not both:
            text = f"No head's queries or keys have a dimension above {self.times:g} × the mean."
            return Finding(text, 0.1, shows="massive_keys")
        top, _ = both.most_common(1)[0]
        text = (
            f"{percent(share)} of heads keep a massive dimension in their queries or keys, most often dimension {top}"
        )
        if wave := _wave(answer, top):
            slower = float(answer.turns(top)[1].mean())
            text += f", of RoPE wavelength {wave} ({percent(slower)} of dimensions have longer ones)"
        return Finding(f"{text}.", 0.1 + 0.35 * share, shows="massive_keys")


def _wave(answer: Massive, dimension: int) -> str:
    """How many tokens a turn takes where a dimension is massive; empty where the model does not show it."""
    known, _ = answer.turns(dimension)
    if not len(known):
        return ""
    told = [f"{x:,.0f}" if math.isfinite(x) else "infinite" for x in (float(known.min()), float(known.max()))]
    return told[0] if told[0] == told[1] else f"{told[0]} to {told[1]}"


def _squares(x: Tensor) -> Tensor:
    """Summed over batch and tokens, `[h d]`."""
    return torch.linalg.vecdot(x, x, dim=2).sum(0)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 5, return_tensors="pt")
    with attach(model, MassiveQK()) as run:
        run(**text)
        print(run[MassiveQK()])
    for finding in MassiveQK().describe(run[MassiveQK()]).findings:
        print(finding.text)
