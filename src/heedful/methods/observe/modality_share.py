"""AEI_m = (A_m / A) / (|m| / N), MDI_m = (A_text / |text|) / (A_m / |m|); A_m is the attention that kind m gets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.errors import FieldError
from heedful.core.figures import Curves, Description, Finding, HeadMap, Role, percent
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.positions import spread_heads
from heedful.core.stats import Mean, Statistic
from heedful.core.summary import Summary, sums

NAMES = {"cls": "class"}  # what people call the tokens of a span


@dataclass(frozen=True, eq=False)
class Shares:
    """What each kind of token gets, and what there is of it; layers are in the order of `layers`."""

    layers: tuple[int, ...]
    attention: dict[str, Tensor] = field(repr=False)  # kind -> [layers h]: share of all attention
    tokens: dict[str, Tensor] = field(repr=False)  # kind -> [layers h]: share of all query-key pairs
    rest: str = "text"  # the kind that the others are held against

    def aei(self, kind: str) -> Tensor:
        """Attention efficiency index by layer: above 1, a kind gets more than its share of tokens."""
        return self.attention[kind].nanmean(1) / self.tokens[kind].nanmean(1)

    def mdi(self, kind: str) -> Tensor:
        """Modality dominance index by layer: what a token of the rest gets over what a token of that kind gets."""
        return self.aei(self.rest) / self.aei(kind)

    def overall(self, kind: str) -> tuple[float, float, float]:
        """Share of attention, share of tokens and MDI, over all layers."""
        got, there = (x[kind].nanmean() for x in (self.attention, self.tokens))
        rest = self.attention[self.rest].nanmean() / self.tokens[self.rest].nanmean()
        return float(got), float(there), float(rest / (got / there))

    def __str__(self) -> str:
        rows = [(kind, *self.overall(kind)) for kind in self.attention]
        return ", ".join(
            f"{kind}: {a:.0%} of attention on {n:.0%} of tokens, MDI {mdi:.2g}" for kind, a, n, mdi in rows
        )


class ModalityShare(Method):
    """How much attention images, sound or other named spans get, against how many tokens they are.

    Give the spans as roles; `.when("decode")` counts what the model looks at while it writes, as the paper does.
    """

    paper = Paper(
        "P034",
        "When Language Overrules: Revealing Text Dominance in Multimodal Large Language Models",
        "Huyu Wu, Meng Tang, Xinhan Zheng, Haiyun Jiang",
        2025,
        "2508.10552",
        "",
        differs=(
            "The authors' full text was not at hand: both indices follow its abstract and another project's form of "
            "its formulas.",
            "AEI's whole is all that is looked at; the authors' is text and the one other modality. They are the same "
            "unless tokens stand in neither.",
            "All queries count; the paper's are the tokens that the model writes, which .when('decode') gives.",
            "A token counts once for each query that may see it; where all see all that is the paper's count. While a "
            "causal text is read early spans get more, as early queries have little else to look at.",
            "Text is the span of that name, or else all that stands in no other named span.",
            "The authors' token compression, by what the encoder's class token gives to patches, is not here.",
        ),
    )
    kinds: tuple[str, ...] = ("image", "video", "audio", "context")  # names of spans; the paper's are modalities
    rest: str = "text"  # what stands in none of them, or in spans of this name where there are any; the paper's is text

    def __post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or self.rest in self.kinds:
            rule = f"must be one or more unlike names, {self.rest!r} aside"
            raise FieldError(self, "kinds", self.kinds, rule, ("image",))

    def idle(self, call: Call) -> bool:
        return call.cross or not {*self.kinds} & call.roles.keys()

    @sums("received")
    def share(self, pattern: Summary, call: Call) -> Statistic | None:
        if pattern.received is None or pattern.seen is None:
            return None
        nothing = torch.zeros_like(call.k_pos, dtype=torch.bool)
        marks = torch.broadcast_tensors(*(call.marked(kind) if kind in call.roles else nothing for kind in self.kinds))
        rest = call.marked(self.rest) if self.rest in call.roles else ~torch.stack(marks).any(0)
        heads = pattern.received.shape[1]
        which = torch.stack([spread_heads(x, heads) for x in (*marks, rest, ~nothing)], -1)  # [b|1 h|1 k kinds]
        which = which.to(pattern.received.dtype)
        got, there = ((x[..., None, :] @ which).sum((0, 2)) for x in (pattern.received, pattern.seen))
        return Mean.of(got, there)  # [h kinds]

    def answer(self, readings: Readings) -> Shares:
        found = [stat for stat in readings.values() if isinstance(stat, Mean)]
        attention, tokens = (
            pad_sequence([x / x[:, -1:] for x in rows], True, float("nan"))  # [layers h kinds]
            for rows in ([stat.total for stat in found], [stat.count for stat in found])
        )
        every = enumerate((*self.kinds, self.rest))
        there = {kind: i for i, kind in every if tokens[..., i].nansum() or kind == self.rest}
        got, pairs = ({kind: x[..., i] for kind, i in there.items()} for x in (attention, tokens))
        return Shares(tuple(readings), got, pairs, self.rest)

    def describe(self, answer: Shares) -> Description:
        maps, roles, findings = [], [], []
        for kind, shares in answer.attention.items():
            name = NAMES.get(kind, kind)
            what = f"The share of its attention that each head gives to {name} tokens."
            values = HeadMap(f"share_{kind}", f"Attention on {name} tokens", what, answer.layers, shares, low=0, high=1)
            maps.append(values)
            if kind == self.rest:
                continue
            heads = {(answer.layers[n], h): float(shares[n, h]) for n, h in (shares > 0.5).nonzero().tolist()}
            what = f"Gives over half of its attention to {name} tokens."
            roles.append(Role(f"looks at {name} tokens", what, dict(sorted(heads.items(), key=lambda head: -head[1]))))
            got, there, mdi = answer.overall(kind)
            text = (
                f"{percent(got)} of attention goes to {name} tokens, which are {percent(there)} of what there is to see"
            )
            if math.isfinite(mdi):
                text += f"; a {self.rest} token gets {mdi:.2g} times what one of them gets"
            findings.append(Finding(f"{text}.", 0.6, shows=f"share_{kind}"))
        what = "The share of attention that a kind of token gets over its share of the tokens; 1 is an even spread."
        lines = {NAMES.get(kind, kind): answer.aei(kind) for kind in answer.attention}
        curves = Curves(
            "efficiency", "Attention against tokens", what, answer.layers, lines, "layer", "efficiency index"
        )
        return Description((*maps, curves), tuple(roles), tuple(findings))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("Read this. " + "The sun rises in the east. " * 20 + "Where does it rise?", return_tensors="pt")
    with attach(model, ModalityShare(), roles={"context": ((3, 140),)}) as run:
        run(**text)
        print(run[ModalityShare()])
