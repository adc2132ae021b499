"""SinkWindow: do a few first tokens keep a windowed model sane?"""

from __future__ import annotations

import torch

from claims._loaded import default
from claims._texts import passages
from claims.ledger import Claim, run
from heedful import attach
from heedful.methods.sparse.prefill.sink_window import SinkWindow

TOKENS, KEPT, SINKS = 1024, 128, 4


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = default()
    text = " ".join(" ".join(passage.split()[:100]) for passage in passages(seed, 12, 100))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
    numbers = {"loss, everything": float(model(input_ids=ids, labels=ids, use_cache=False).loss)}
    for name, method in (
        ("sinks and window", SinkWindow(SINKS, KEPT - SINKS)),
        ("window alone", SinkWindow(0, KEPT)),
    ):
        with attach(model, method):
            numbers[f"loss, {name}"] = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    return numbers["loss, window alone"] - numbers["loss, sinks and window"], numbers


CLAIM = Claim(
    key="2309.17453",
    method="SinkWindow",
    says="A window alone ruins a model; with four first tokens kept beside it the model stays what it was.",
    paper_number="stable to 4 million tokens (abstract)",
    setup=f"SmolLM2-135M, {TOKENS} tokens of prose, {KEPT} keys a query: {SINKS} sinks and a window against a window "
    "alone. Within the trained length, so endless text is not tested.",
    effect="nats of loss per token that the sinks save at equal memory",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
