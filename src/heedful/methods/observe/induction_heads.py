"""On random tokens that repeat after p: A at i-1 (previous), the sum of A at i-jp (echo) and at i-jp+1 (induction)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heedful.core.call import Call, Phase
from heedful.core.entry import Probe, Readings
from heedful.core.figures import Description, Finding, Head, HeadMap, Role, counted, head_name, percent
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, ShareBelowOne
from heedful.core.stats import Mean, Statistic
from heedful.core.summary import Summary, sums

SCORES = {
    "induction": ("induction head", "to what followed the same token before"),
    "echo": ("duplicate-token head", "to earlier copies of the same token"),
    "previous": ("previous-token head, synthetic text", "to the token before"),
}


@dataclass(frozen=True, eq=False)
class Copying:
    """Mean weight that each head gives to the three places, by layer `[h]`; nan where no token had such a place."""

    induction: dict[int, Tensor] = field(repr=False)
    echo: dict[int, Tensor] = field(repr=False)
    previous: dict[int, Tensor] = field(repr=False)

    def heads(self, score: str, above: float) -> dict[Head, float]:
        """The heads whose "induction", "echo" or "previous" score lies above that, the highest first."""
        rows = getattr(self, score).items()
        found = {(layer, h): x for layer, row in rows for h, x in enumerate(row.tolist()) if x > above}
        return dict(sorted(found.items(), key=lambda head: -head[1]))

    def __str__(self) -> str:
        best = {score: next(iter(self.heads(score, -1.0).items()), None) for score in SCORES}
        return ", ".join(f"{name}: {head_name(*x[0])} {x[1]:.0%}" for name, x in best.items() if x) or "nothing read"


class InductionHeads(Method):
    """How much each head looks at the token before, at earlier copies of a token and at what followed them.

    Meant for random tokens that come again after `period` tokens, and for no other text: `heedful.diagnose` reads such
    prompts, its own; of prompts of yours, tell it the period.
    """

    paper = Paper(
        "P189",
        "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
        "Hanlin Tang, Yang Lin, Jing Lin, Qingsen Han, Shikuan Hong, Yiwu Yao, Gongyi Wang",
        2025,
        "2407.15891",
        "ICLR 2025",
        differs=(
            "The authors' full text was not at hand: the two scores follow summaries of it.",
            "Its scores of heads alone; the cache that it builds on them is another entry.",
            "64 tokens four times; the authors repeat 2500 tokens four times. Models short of positions get "
            "fewer repeats.",
            "The first token never counts as a copy, since many heads park on it.",
            "The score of the previous token is not in the paper; it is the other half of an induction head.",
        ),
    )
    period: Annotated[int, Ge(3)] = 64  # tokens until the text comes again; the paper's 2500
    repeats: Annotated[int, Ge(2)] = 4  # times that it is there; the paper's
    texts: PositiveInt = 1  # texts to draw
    seed: int = 0
    share: ShareBelowOne = 0.3  # score above which a head plays a role; the paper takes the best 14 % and 1 % instead

    def probes(self, vocabulary: Tensor, length: int) -> Iterable[Probe]:
        repeats = min(self.repeats, length // self.period)
        if repeats >= 2:
            draw = torch.Generator().manual_seed(self.seed)
            once = vocabulary[torch.randint(len(vocabulary), (self.texts, self.period), generator=draw)]
            yield Probe(once.repeat(1, repeats), {})

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or call.cross

    @sums("first", "distance")
    def score(self, pattern: Summary, call: Call) -> Statistic | None:
        if pattern.first is None or pattern.distance is None:
            return None
        is_text = call.is_text.expand(len(pattern.first), 1, -1)
        position = call.pairs.q[..., 0].expand_as(pattern.first)
        slots = (position - pattern.nearest).clamp(0, pattern.distance.shape[-1] - 1)
        rest = pattern.distance.scatter_add(-1, slots, -pattern.first.where(is_text, 0.0))  # the first token taken out
        behind = rest[..., max(0, -pattern.nearest) :].sum(0)  # [h m]
        p = self.period
        positions = behind[:, p - 1 :: p], behind[:, p::p], behind[:, 1:2]
        # how many tokens have such a place that is not the first token
        counts = [int((is_text & (call.pairs.q[..., 0] >= start)).sum()) for start in (p, p + 1, 2)]
        total = torch.stack([x.sum(-1) for x in positions], -1)
        return Mean.of(total, torch.tensor(counts, device=total.device))

    def answer(self, readings: Readings) -> Copying:
        found = {layer: stat.value for layer, stat in readings.items()}
        return Copying(*({layer: x[:, i] for layer, x in found.items()} for i in range(len(SCORES))))

    def describe(self, answer: Copying) -> Description:
        figures, roles = [], []
        for score, (name, where) in SCORES.items():
            rows = getattr(answer, score)
            values = pad_sequence(list(rows.values()), True, float("nan"))
            what = f"The share of its attention that each head gives {where}, on random tokens that repeat."
            figures.append(HeadMap(score, name.capitalize(), what, list(rows), values, low=0, high=1))
            what = f"Gives over {percent(self.share)} of its attention {where}, on random tokens that repeat."
            roles.append(Role(name, what, answer.heads(score, self.share)))
        measured = not figures[0].values.isnan().all()
        return Description(tuple(figures), tuple(roles), (_finding(roles),) if measured else ())


def _finding(roles: list[Role]) -> Finding:
    copies = roles[0].heads
    if not copies:
        text = "No induction head: none looks for what followed the same token before."
        return Finding(text, 0.1, shows="induction")
    named = [f"{head_name(*head)} ({percent(x)})" for head, x in list(copies.items())[:4]]
    rest = f" and {len(copies) - len(named)} more" if len(copies) > len(named) else ""
    text = (
        f"Induction heads {', '.join(named)}{rest}: where a text comes again they look at what followed the last time. "
        f"The same random tokens, repeated, show {counted(len(roles[1].heads), 'duplicate-token head')} and "
        f"{counted(len(roles[2].heads), 'previous-token head')}."
    )
    return Finding(text, 0.4 + 0.4 * max(copies.values()), shows="induction")


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    method = InductionHeads(texts=1)
    with attach(model, method) as run:
        for probe in method.probes(torch.arange(1000, tokenizer.vocab_size), 256):
            run(input_ids=probe.tokens)
        print(run[method])
