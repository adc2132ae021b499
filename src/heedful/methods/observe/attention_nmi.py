"""NMI = I(q; k) / sqrt(H(q) H(k)) with p(q) = 1/n and p(k | q) = A_qk: how far where one looks depends on the query."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heedful.core.call import Call, Phase
from heedful.core.entry import Readings
from heedful.core.errors import FieldError
from heedful.core.figures import Curves, Description, Finding, HeadMap, Role, counted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.positions import spread_heads
from heedful.core.ranges import ShareBelowOne
from heedful.core.sites import Site, reads
from heedful.core.stats import Statistic, Sum
from heedful.kit.pieces import added

LABELS = ("global", "hybrid", "local")
MEANING = {
    "global": "all queries look at much the same",
    "hybrid": "each looks around itself and at what all look at",
    "local": "each looks at something of its own",
}


@dataclass(frozen=True, eq=False)
class Dependence:
    """The normalised mutual information between queries and keys; layers are in the order of `layers`."""

    layers: tuple[int, ...]
    values: Tensor = field(repr=False)  # [layers h], means over texts or images; nan where a layer has no such head
    low: float
    high: float

    @property
    def by_layer(self) -> dict[int, float]:
        """Each layer's mean over heads, of those where there is one."""
        means = zip(self.layers, self.values.nanmean(1).tolist(), strict=True)
        return {layer: value for layer, value in means if not math.isnan(value)}

    def label(self, value: float) -> str:
        """What attention of such an NMI is called."""
        return LABELS[(value >= self.low) + (value > self.high)]

    @property
    def labels(self) -> dict[int, str]:
        """What each layer is called."""
        return {layer: self.label(value) for layer, value in self.by_layer.items()}

    def __str__(self) -> str:
        each = ", ".join(f"{n}: {value:.2f} {self.label(value)}" for n, value in self.by_layer.items())
        return f"normalised mutual information of queries and keys, by layer {each}"


class AttentionNMI(Method):
    """Whether a layer's attention is local, global or in between, from one number that needs no distances.

    Of an image's tokens the patches alone are taken, as queries and as keys.
    """

    paper = Paper(
        "P337",
        "UNIP: Rethinking Pre-trained Attention Patterns for Infrared Semantic Segmentation",
        "Tao Zhang, Jinyong Wen, Zhen Chen, Kun Ding, Shiming Xiang, Chunhong Pan",
        2025,
        "2502.02257",
        "ICLR 2025",
        differs=(
            "The authors' full text was not at hand, and their code has no NMI: it is that of the work it is taken "
            "from (Park et al., 2305.00729), class token left out, weights among patches made to add up to one.",
            "Between which values a layer is called hybrid is ours: evenly over 7 x 7 of 16 x 16 patches is 0.30, over "
            "3 x 3 of them 0.60, and half of that with the other half common to all about 0.2.",
            "The measure alone: distilling a hybrid layer's maps into another model is not here.",
            "Causal texts are read too, where a query's place alone tells something of where it looks. A text may "
            "come in several calls, each going on where the last one ended; decoding steps are not counted.",
        ),
    )
    one_text = True
    low: ShareBelowOne = 0.1  # NMI below which a layer is called global
    high: float = 0.25  # NMI above which it is called local

    def __post_init__(self) -> None:
        if not self.low < self.high <= 1:
            raise FieldError(self, "high", self.high, f"must be an NMI above `low`, {self.low}, and at most 1", 0.25)

    def idle(self, call: Call) -> bool:
        return call.cross or call.phase is Phase.DECODE

    @reads(Site.PATTERN)
    def depend(self, weights: Tensor, call: Call) -> Statistic:
        rows = call.is_text[..., None].expand(*weights.shape[:3], 1)
        weights = weights.detach().double()
        if "patches" in call.roles:
            q, k = (spread_heads(x, weights.shape[1]) for x in (call.marked_queries("patches"), call.marked("patches")))
            rows, weights = rows & q[..., None], weights * k[:, :, None]
        total = weights.sum(-1, keepdim=True)
        rows = rows & (total > 0)
        weights = torch.where(rows, weights / total.clamp(min=1e-30), 0.0)
        each = torch.stack([rows[..., 0].sum(-1), torch.special.entr(weights).sum((-2, -1))], -1)
        return Sum.of(torch.cat([each, call.keys.by_position(weights.sum(-2))], -1))  # [b h 2+k]

    def finish(self, statistic: Statistic, call: Call) -> Statistic:
        count, entropy, received = statistic.value.split((1, 1, statistic.value.shape[-1] - 2), -1)
        text = added(call, "pairs", count=count, entropy=entropy, received=received)
        if text is None:
            return Sum.of(count[0].new_zeros(count.shape[1], 2))
        before, now = text
        return Sum.of(_summed(**now) - (0 if before is None else _summed(**before)))

    def answer(self, readings: Readings) -> Dependence:
        found = [stat.value for stat in readings.values()]
        values = pad_sequence([x[:, 0] / x[:, 1] for x in found], True, float("nan"))
        return Dependence(tuple(readings), values, self.low, self.high)

    def describe(self, answer: Dependence) -> Description:
        if bool(answer.values.isnan().all()):  # no text had two tokens
            return Description()
        what = (
            "The mutual information between a query's place and where it looks, over what it could be: 0 where all "
            "look at the same, 1 where each looks at one place of its own."
        )
        heads = HeadMap("nmi", "Dependence on the query", what, answer.layers, answer.values, "score", 0, 1)
        by_layer = answer.values.nanmean(1)
        depth = Curves(
            "nmi_depth", "Dependence on the query by layer", what, answer.layers, {"mean of heads": by_layer},
            "layer", "NMI", folded=True,
        )  # fmt: skip
        roles = []
        for label in LABELS:
            each = {
                (answer.layers[n], h): float(answer.values[n, h])
                for n, h in (~answer.values.isnan()).nonzero().tolist()
                if answer.label(float(answer.values[n, h])) == label
            }
            ranked = dict(sorted(each.items(), key=lambda head: head[1], reverse=label != "global"))
            roles.append(Role(f"{label} attention", f"By NMI: {MEANING[label]}.", ranked, "score"))
        named = list(answer.labels.values())
        told = ", ".join(f"{counted(named.count(x), 'layer')} {x}" for x in LABELS if x in named)
        values = answer.by_layer.values()
        text = (
            f"By the mutual information of queries and keys, {min(values):.2f} to {max(values):.2f} by layer, "
            f"attention is in {told}."
        )
        return Description((heads, depth), tuple(roles), (Finding(text, 0.3, shows="nmi"),))


def _summed(count: Tensor, entropy: Tensor, received: Tensor) -> Tensor:
    """NMI added up over texts, and how many there were, `[h 2]`."""
    real = count[..., 0] > 1  # one query has nothing to depend on
    n = count.clamp(min=1)
    keys = torch.special.entr(received / n).sum(-1)
    mutual = (keys - (entropy / n)[..., 0]).clamp(min=0.0)
    nmi = mutual / (n[..., 0].log() * keys).sqrt().clamp(min=1e-9)
    return torch.stack([nmi.where(real, 0.0).sum(0), real.double().sum(0)], -1)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.vision().model
    with torch.no_grad(), attach(model, AttentionNMI()) as run:
        run(pixel_values=torch.randn(1, 3, 224, 224))
        print(run[AttentionNMI()])
