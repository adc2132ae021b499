"""InductionHeads: are the heads that score high the ones that need the far context, so that others can lose it?"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn

from claims._loaded import default
from claims.ledger import Claim, run
from heedful import attach
from heedful.core.figures import Head
from heedful.methods.observe.induction_heads import InductionHeads
from heedful.methods.sparse.prefill.sink_window import SinkWindow

INDUCTION, ECHO = 0.14, 0.01  # the paper's shares of heads to keep
SINKS, WINDOW = 4, 32  # tokens that all other heads see
COPY = 128  # random tokens, which then come again


def windowed(keep: set[Head], layers: int, heads: int) -> Any:
    """All heads but these see sinks and a window alone."""
    others = {n: [h for h in range(heads) if (n, h) not in keep] for n in range(layers)}
    return reduce(or_, (SinkWindow(SINKS, WINDOW).on(layers=n, heads=row) for n, row in others.items() if row))


@torch.no_grad()
def loss(model: Any, ids: Tensor, what: Any = None) -> float:
    """Nats a token of the second copy."""
    if what is None:
        logits = model(ids, use_cache=False).logits
    else:
        with attach(model, what) as attached:
            logits = attached(input_ids=ids, use_cache=False).logits
    return float(nn.functional.cross_entropy(logits[0, COPY:-1], ids[0, COPY + 1 :]))


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = default()
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    words = torch.arange(1000, tokenizer.vocab_size)
    method = InductionHeads(seed=seed)
    with attach(model, method) as attached, torch.no_grad():
        for probe in method.probes(words, 512):
            attached(input_ids=probe.tokens, use_cache=False)
        scores = attached[method]
    every = layers * heads
    best = [*scores.heads("induction", -1.0)][: round(INDUCTION * every)]
    best += [*scores.heads("echo", -1.0)][: round(ECHO * every)]
    kept = set(best)
    mixed = torch.randperm(every)[: len(kept)].tolist()
    once = words[torch.randint(len(words), (1, COPY))]
    ids = torch.cat([once, once], 1)
    numbers = {
        "loss, all heads see all": loss(model, ids),
        "loss, best heads see all": loss(model, ids, windowed(kept, layers, heads)),
        "loss, random heads see all": loss(model, ids, windowed({divmod(i, heads) for i in mixed}, layers, heads)),
        "heads kept": float(len(kept)),
        "highest induction score": next(iter(scores.heads("induction", -1.0).values())),
        "highest echo score": next(iter(scores.heads("echo", -1.0).values())),
    }
    return numbers["loss, random heads see all"] - numbers["loss, best heads see all"], numbers


CLAIM = Claim(
    key="P189",
    method="InductionHeads",
    says="A few heads, found by induction and echo scores on repeated random tokens, use the far context; the others "
    "can lose it without noticeable loss.",
    paper_number="top 14 % of heads by induction and 1 % by echo keep the full cache",
    setup="SmolLM2-135M-Instruct copying 128 random tokens while all heads but the best 15 % by score see 4 sinks and "
    "32 tokens, against as many heads by chance. The paper's compensation token and its tasks are not tested.",
    effect="loss in nats a copied token, heads by chance minus heads by score",
    measure=measure,
    strong=0.5,
)


if __name__ == "__main__":
    run(CLAIM)
