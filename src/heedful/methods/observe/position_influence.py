"""X_l = ((1 - r) A_l + r I) X_(l-1), X_0 the part of the text that a token stands in, A_l the head mean of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.entry import Readings
from heedful.core.figures import Curves, Description, Finding, percent
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, ShareBelowOne
from heedful.core.stats import Statistic, Sum
from heedful.core.summary import Summary, sums


@dataclass(frozen=True, eq=False)
class Influence:
    """Where in the text comes from what reaches a token, through all layers up to this one."""

    last: Mapping[int, Tensor] = field(repr=False)  # layer -> [1 + parts]: on the last token; the first token by itself
    mean: Mapping[int, Tensor] = field(repr=False)  # the same over all tokens

    @property
    def first(self) -> dict[int, float]:
        """The first token's influence on the last one, by depth."""
        return {n: float(x[0]) for n, x in self.last.items()}

    @property
    def total(self) -> Tensor:
        """The influence on the last token after the last layer, `[1 + parts]`."""
        return self.last[max(self.last)]

    def __str__(self) -> str:
        parts = " ".join(f"{float(x):.0%}" for x in self.total[1:])
        return f"influence on the last token: first token {float(self.total[0]):.1%}; then by part of the text {parts}"


class PositionInfluence(Method):
    """Which parts of a text have a say in its last token when attention is followed through all layers."""

    paper = Paper(
        "P331",
        "On the Emergence of Position Bias in Transformers",
        "Xinyi Wu, Yifei Wang, Stefanie Jegelka, Ali Jadbabaie",
        2025,
        "2502.01951",
        "ICML 2025",
        differs=(
            "The paper follows one head a layer; here a layer's heads are averaged.",
            "The residual connection counts half, as in rollout (P098); without it, as in the paper's theorem, trained "
            "models with sinks fall onto the first token at once.",
            "Sources are equal parts of the text and the first token by itself, so that the product of N x N matrices "
            "is never formed.",
            "Rows are divided by their sum, which matters only where weights do not sum to one.",
            "Parts of a model that read another sequence, and texts that come in pieces, are left out.",
        ),
    )
    parts: PositiveInt = 15  # equal parts of the text after its first token; with it they fill one panel of a kernel
    residual: ShareBelowOne = 0.5  # share of the residual connection, as in rollout; the paper's theorem has 0

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or call.cross or call.queries.first != 0

    def carries(self, call: Call) -> Tensor | None:
        """What the layer before left; or which part each token stands in, where there is none before."""
        scratch = call.state.forward
        before, x = scratch.get("layer"), scratch.pop("next", None)
        started: set[int] = scratch.setdefault("started", set())
        scratch["layer"], scratch["x"] = call.layer, None
        position, is_text = (p[:, 0] for p in (call.q_pos, call.is_text))
        position, is_text = torch.broadcast_tensors(position, is_text)
        if call.lowest not in started:
            started.add(call.lowest)
            length = (position * is_text).amax(-1, keepdim=True)  # but for the first token
            part = 1 + (position - 1).clamp(min=0) * self.parts // length.clamp(min=1)
            part = part.clamp(max=self.parts).where(position > 0, 0)
            x = torch.nn.functional.one_hot(part, self.parts + 1).float() * is_text[..., None]
        elif before != call.below:
            return None
        scratch["x"] = x
        return x

    @sums("carried")
    def spread(self, pattern: Summary, call: Call) -> Statistic | None:
        x: Tensor | None = call.state.forward.get("x")
        if x is None or pattern.carried is None:
            return None
        mixed = pattern.carried  # [b q c]
        mixed = mixed / mixed.sum(-1, keepdim=True).clamp(min=1e-30)  # each row of x sums to one
        if self.residual:
            mixed = (1 - self.residual) * mixed + self.residual * x
        call.state.forward["next"] = mixed
        position, is_text = call.q_pos[:, 0], call.is_text[:, 0]
        end = is_text & (position == (position * is_text).amax(-1, keepdim=True))
        found = torch.cat([mixed, torch.ones_like(mixed[..., :1])], -1).double()  # the last counts texts and tokens
        return Sum.of(torch.stack([(found * rows[..., None]).sum((0, 1)) for rows in (end, is_text)]))

    def answer(self, readings: Readings) -> Influence:
        shares = {n: stat.value[:, :-1] / stat.value[:, -1:] for n, stat in readings.items()}
        return Influence({n: x[0] for n, x in shares.items()}, {n: x[1] for n, x in shares.items()})

    def describe(self, answer: Influence) -> Description:
        layers = list(answer.last)
        some = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
        rest = {n: x[1:] / x[1:].sum() for n, x in answer.last.items()}
        curve = Curves(
            "influence",
            "Influence by place in the text",
            "Which parts of the text reach the last token, from the start at 0 to the end at 100, followed through all "
            "layers up to the one named. The first token, which often has nearly all, is left out.",
            x=[100 * (i + 0.5) / self.parts for i in range(self.parts)],
            lines={f"up to layer {n}": rest[n] for n in some},
            x_label="place in the text, %",
            y_label="share but for the first token",
            folded=True,
        )
        depth = Curves(
            "influence_depth",
            "Influence of the first token by depth",
            "How much of what reaches a token comes from the text's first one, through all layers up to each; by "
            "rollout, which ignores value norms.",
            x=layers,
            lines={
                "on the last token": torch.tensor(list(answer.first.values())),
                "on all tokens": torch.stack([x[0] for x in answer.mean.values()]),
            },
            x_label="layer",
            y_label="share",
        )
        first, early = float(answer.total[0]), float(rest[layers[-1]][: self.parts // 2].sum())
        text = (
            f"By rollout, which ignores value norms, {percent(first)} of what reaches the last token through all "
            "layers is the first token's"
        )
        if self.parts > 1 and early == early:  # not nan: some of it is not
            text += f"; of the rest, {percent(early)} comes from the first half of the text"
        finding = Finding(f"{text}.", 0.1 + 0.4 * first, ("AttentionRollout",), "influence_depth")
        return Description((curve, depth), findings=(finding,))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 10, return_tensors="pt")
    with attach(model, PositionInfluence()) as run:
        run(**text)
        print(run[PositionInfluence()])
    for finding in PositionInfluence().describe(run[PositionInfluence()]).findings:
        print(finding.text)
