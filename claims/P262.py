"""PositionalHeads: do the heads that slow dimensions steer attend farther back than others?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._loaded import default
from claims._texts import passages
from claims.ledger import Claim, run
from heedful import attach
from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.stats import Sum
from heedful.core.summary import Summary, sums
from heedful.methods.observe.positional_heads import PositionalHeads

TEXTS, TOKENS, FAR = 2, 512, 64  # a seed


class FarMass(Method):
    """The weight that each head spends far back, the first token left out, for this experiment only."""

    paper = PositionalHeads.paper

    @sums("distance", "first")
    def measure(self, pattern: Summary, call: Call) -> Sum | None:
        if pattern.behind is None or pattern.first is None:
            return None
        far = pattern.behind[..., FAR:].sum((0, -1)) - pattern.first[..., FAR:].sum((0, -1))
        return Sum.of(far / (len(call.queries) - FAR))


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = default()
    method = PositionalHeads(far=FAR)
    with attach(model, method | FarMass()) as attached, torch.no_grad():
        for text in passages(seed, TEXTS, TOKENS):
            attached(input_ids=torch.tensor([tokenizer(text).input_ids[:TOKENS]]))
        found, mass = attached[method], attached[FarMass()]
    correlation = torch.cat(list(found.correlation.values()))
    spent: Tensor = torch.cat([x.value for x in mass.values()]) / TEXTS
    top = correlation >= correlation.median()
    share = torch.stack(list(found.share.values())).mean((0, 1))
    ranks = torch.stack([x.argsort().argsort().double() for x in (correlation, spent)])
    numbers = {
        "median correlation of the slow half": float(correlation.median()),
        "positional heads": float(len(found.heads)) / len(correlation),
        "weight on far tokens but the first, upper half of heads": float(spent[top].mean()),
        "weight on far tokens but the first, lower half of heads": float(spent[~top].mean()),
        "largest share of one dimension": float(share.max()),
        "its dimension": float(share.argmax()),
    }
    return float(torch.corrcoef(ranks)[0, 1]), numbers


CLAIM = Claim(
    key="P262",
    method="PositionalHeads",
    says="Some heads, steered by the slowly turning dimensions of the rotary embedding, carry long-range interaction "
    "and decide how well a model reads long inputs.",
    paper_number="none in the abstract",
    setup="SmolLM2-135M-Instruct, 2 of Python's help texts a seed cut to 512 tokens; weight spent 64 tokens back and "
    "more, without the first token, which is a sink. No head is ablated and no context extended.",
    effect="rank correlation over heads, slow part's correlation against weight spent far back",
    measure=measure,
    strong=0.2,
)


if __name__ == "__main__":
    run(CLAIM)
