"""Rectified attention: does it train as well as softmax, with most weights at zero and heads that switch off?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._tiny_lm import HeadNorm, Trained, batch
from claims.ledger import Claim, run
from heedful import Site, edit
from heedful.authoring import reads
from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.stats import Mean
from heedful.methods import RectifiedAttention

STEPS = 200
MARGIN = 0.02  # of softmax's loss, as in the claim about sigmoid attention: what we still call a match


class Zeros(Method):
    """The share of pairs that weigh nothing, and of rows in which nothing weighs anything."""

    paper = HeadNorm.paper

    def idle(self, call: Call) -> bool:
        return torch.is_grad_enabled()  # read after training alone

    @reads(Site.PATTERN)
    def read(self, weights: Tensor, call: Call) -> Mean:
        keep = torch.ones_like(weights, dtype=torch.bool) if call.keep is None else call.keep.expand_as(weights)
        zero = (weights == 0) & keep
        rows = (zero | ~keep).all(-1)
        of = torch.stack([keep.sum(), torch.tensor(rows.numel())])
        return Mean.of(torch.stack([zero.sum(), rows.sum()]).double(), of)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    zeros = Zeros()
    soft = Trained(None, seed, STEPS).loss()
    trained = Trained(RectifiedAttention() | zeros, seed, STEPS)
    numbers = {"loss, softmax": soft, "loss, ReLA": trained.loss()}
    trained.run.reset()
    with torch.no_grad():
        trained(input_ids=batch(torch.Generator().manual_seed(12345), held_out=True, rows=32), use_cache=False)
    pairs, rows = torch.stack([mean.value for mean in trained.run[zeros].values()]).mean(0).tolist()
    numbers |= {"share of weights at zero": pairs, "share of rows that look at nothing": rows}
    bare = edit(Site.NORMALISE, lambda scores, call: torch.relu(scores))
    numbers["loss, without the norm"] = Trained(bare, seed, STEPS).loss()
    return (1 + MARGIN) * soft - numbers["loss, ReLA"], numbers


CLAIM = Claim(
    key="P228",
    method="RectifiedAttention",
    says="Attention by ReLU and a gated norm matches softmax, with most weights exactly zero.",
    paper_number="translation within about 0.3 BLEU of softmax on five tasks; high sparsity, some rows look at nothing",
    setup=f"A 2-layer byte model trained {STEPS} steps on Python's documentation with softmax, with ReLA, "
    "and with ReLU alone; held-out loss. A match is a loss at most 2 % above softmax's.",
    effect="nats a byte left below softmax's loss plus 2 %",
    measure=measure,
    seeds=5,
)

if __name__ == "__main__":
    run(CLAIM)
