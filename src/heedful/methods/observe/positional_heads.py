"""r_h = correlation over distant keys of sum_slow q_j k_j with q k, the slow j being the half that turns slowest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.figures import Curves, Description, Finding, HeadMap, Role, percent
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, ProperShare
from heedful.core.sites import Site, reads
from heedful.core.stats import Statistic, Sum
from heedful.kit.rotary import periods


@dataclass(frozen=True, eq=False)
class Positional:
    """What the slowly turning dimensions have to say about each head's scores of distant keys."""

    correlation: Mapping[int, Tensor] = field(repr=False)  # layer -> [h]: the slow part's, with the whole score
    share: Mapping[int, Tensor] = field(repr=False)  # layer -> [h d]: of the scores' variance, by dimension; sums to 1
    high: float

    @property
    def heads(self) -> dict[tuple[int, int], float]:
        """The positional heads, highest correlation first."""
        found = {(n, h): float(r) for n, row in self.correlation.items() for h, r in enumerate(row) if r >= self.high}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        top = ", ".join(f"{n}.{h}" for n, h in list(self.heads)[:8])
        return f"{len(self.heads)} positional heads (correlation {self.high:g} or more): {top or 'none'}"


class PositionalHeads(Method):
    """Heads whose scores of distant tokens come from the dimensions that turn slowest with position."""

    paper = Paper(
        "P262",
        "On the Token Distance Modeling Ability of Higher RoPE Attention Dimension",
        "Xiangyu Hong, Che Jiang, Biqing Qi, Fandong Meng, Mo Yu, Bowen Zhou, Jie Zhou",
        2024,
        "2410.08703",
        "EMNLP 2024 Findings",
        differs=(
            "The authors' own metric was not at hand in full: the correlation is that of the slow half's part of a "
            "score with the whole score, within a query, over its distant keys.",
            "Scores of a few queries spread over the text, before mask, cap and softmax; keys outside a sliding window "
            "count as well.",
            "The threshold for a positional head is ours.",
        ),
    )
    one_text = True
    far: PositiveInt = 64  # tokens; from this distance on a key is distant
    rows: PositiveInt = 8  # queries looked at in a text; cost grows with them
    high: ProperShare = 0.9  # correlation from which on a head is called positional

    @classmethod
    def example(cls) -> PositionalHeads:
        return cls(far=2)

    def idle(self, call: Call) -> bool:
        return call.cross

    @reads(Site.QUERY)
    def look(self, query: Tensor, call: Call) -> None:
        """Leave the queries for `correlate`, which has the keys."""
        call.state.forward["query"] = query.detach()

    @reads(Site.KEY)
    def correlate(self, key: Tensor, call: Call) -> Statistic | None:
        query: Tensor = call.state.forward.pop("query")
        turns = periods(call, query.shape[-1])
        if turns is None:
            return None
        slow = turns >= turns.sort().values[len(turns) // 2]
        (b, h, n, d), g = query.shape, key.shape[1]
        is_text, position = (x[:, 0].expand(b, n) for x in (call.is_text, call.q_pos))
        # evenly spread over each text, the last of its tokens among them
        steps = torch.arange(1, self.rows + 1, device=query.device)
        at = (is_text.int().argmax(-1)[:, None] + is_text.sum(-1, keepdim=True) * steps // self.rows - 1).clamp(
            0, n - 1
        )
        q = query.gather(2, at[:, None, :, None].expand(b, h, -1, d)).reshape(b, g, -1, d).float()  # [b g h/g*r d]
        where = call.k_pos[:, 0, None]  # [b|1 1 k]
        keep = (position.gather(1, at)[..., None] - where >= self.far) & (where >= 0) & is_text.gather(1, at)[..., None]
        keep = keep.repeat(1, h // g, 1)[:, None].to(q.dtype)  # [b 1 h/g*r k]
        k = key.detach().float()

        def centred(x: Tensor) -> Tensor:
            x = x * keep
            return x - keep * (x.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1))

        score, part = centred(q @ k.mT), centred((q * slow) @ k.mT)
        # covariance of each dimension's part of the score with the score; over all dimensions it adds up to variance
        found = [q * (score @ k), *((x * y).sum(-1, keepdim=True) for x, y in ((part, score), (part, part)))]
        return Sum.of(torch.cat(found, -1).double().reshape(b, h, self.rows, d + 2).sum((0, 2)))  # [h d+2]

    def answer(self, readings: Readings) -> Positional:
        found = {n: stat.value for n, stat in readings.items()}
        whole = {n: x[:, :-2].sum(-1) for n, x in found.items()}
        return Positional(
            {n: x[:, -2] / (x[:, -1] * whole[n]).sqrt() for n, x in found.items()},
            {n: x[:, :-2] / whole[n][:, None] for n, x in found.items()},
            self.high,
        )

    def describe(self, answer: Positional) -> Description:
        layers = list(answer.correlation)
        heat = HeadMap(
            "positional",
            "Positional heads",
            f"How far a head's scores of keys {self.far} tokens back and more follow from the half of its dimensions "
            "with the longest RoPE wavelengths; 1 means entirely.",
            layers=layers,
            values=torch.stack(list(answer.correlation.values())),
            unit="score",
            low=0.0,
            high=1.0,
        )
        share = torch.stack(list(answer.share.values())).nanmean((0, 1))
        curve = Curves(
            "positional_dimensions",
            "Which dimensions decide about distant keys",
            "The share of what tells distant keys apart that each dimension of a head brings, over all heads.",
            x=list(range(len(share))),
            lines={"all heads": share},
            x_label="dimension",
            y_label="share",
            folded=True,
        )
        heads = answer.heads
        if not heads:
            return Description((heat, curve))
        total = sum(len(row) for row in answer.correlation.values())
        role = Role(
            "long RoPE wavelengths",
            "Scores distant tokens by the half of its dimensions with the longest RoPE wavelengths.",
            heads,
        )
        text = (
            f"{percent(len(heads) / total)} of heads score distant tokens almost only by the dimensions with the "
            "longest RoPE wavelengths."
        )
        weight = 0.1 + 0.4 * len(heads) / total
        return Description((heat, curve), (role,), (Finding(text, weight, shows="positional"),))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, PositionalHeads()) as run:
        run(**text)
        print(run[PositionalHeads()])
    for finding in PositionalHeads().describe(run[PositionalHeads()]).findings:
        print(finding.text)
