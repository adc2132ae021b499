"""QuantVLA: do a scale for each head's scores and one for each layer's output make up for rounding?"""

from __future__ import annotations

from dataclasses import replace

import torch

from claims import P322
from claims._loaded import default
from claims.ledger import Claim, run
from claims.P027 import TOKENS, shown
from heedful import fit, operate
from heedful.core.fitted import Fitted
from heedful.methods import Absmax, QuantVLA

BITS, SHOWN = 3, 5


def dealt(seed: int, scales: Fitted) -> Fitted:
    """The same scales, those of scores to other heads of any layer and those of outputs to other layers."""
    table = torch.stack(list(scales.values()))
    draw = torch.Generator().manual_seed(seed)
    heads = table[:, :-1].flatten()
    heads = heads[torch.randperm(len(heads), generator=draw)].view(len(table), -1)
    outputs = table[torch.randperm(len(table), generator=draw), -1:]
    return Fitted(dict(zip(scales, torch.cat([heads, outputs], 1), strict=True)))


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, ids = default().model, P322.texts(seed)
    found = fit(QuantVLA(Absmax(BITS)), model, shown(seed, SHOWN))
    table = torch.stack(list((found.scales or {}).values()))
    numbers = {
        "loss": P322.loss(model, ids),
        "loss, rounded": P322.loss(operate(model, Absmax(BITS)), ids),
        "loss, both scales": P322.loss(operate(model, found), ids),
        "loss, scales dealt to others": P322.loss(
            operate(model, replace(found, scales=dealt(seed, found.scales or Fitted({})))), ids
        ),
        "mean scale of scores": table[:, :-1].mean().item(),
        "mean scale of outputs": table[:, -1].mean().item(),
    }
    return numbers["loss, rounded"] - numbers["loss, both scales"], numbers


CLAIM = Claim(
    key="P327",
    method="QuantVLA",
    says="Scores with their spread and outputs with their size given back, a rounded model does better.",
    paper_number="LIBERO success above full precision, of vision-language-action models",
    setup=f"SmolLM2-135M-Instruct, attention's projections of all layers in {BITS} bits, nearest values; both scales "
    f"fitted to {SHOWN} texts of {TOKENS} tokens of Python's documentation a seed; loss on {P322.TEXTS} others of "
    f"{P322.TOKENS}. Detail: the same scales dealt to other heads and layers. A language model alone, no robot.",
    effect="nats a token that the rounded model loses more without the scales",
    measure=measure,
    seeds=5,
)

if __name__ == "__main__":
    run(CLAIM)
