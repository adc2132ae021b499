"""AttentionRollout: does it tell better than raw attention which words an encoder's answer rests on?"""

from __future__ import annotations

from claims._number import SENTENCES, STEPS, correlations
from claims.ledger import Claim, run


def over_raw(name: str, seed: int) -> tuple[float, dict[str, float]]:
    numbers = correlations(seed)
    return numbers[f"rank correlation, {name}"] - numbers["rank correlation, raw, layer 6"], numbers


def measure(seed: int) -> tuple[float, dict[str, float]]:
    return over_raw("rollout", seed)


CLAIM = Claim(
    key="P098",
    method="AttentionRollout",
    says="Rollout (and attention flow) correlate better with ablation and gradient importance than raw attention does.",
    paper_number="none in the abstract",
    setup=f"A 6-layer encoder trained {STEPS} steps a seed to tell from [CLS] whether the subject of a made-up "
    f"sentence is one or many, the paper's task; {SENTENCES} new sentences; Spearman, over words, of the row of [CLS] "
    "with how far the right answer's probability moves when a word becomes [UNK]; against the last layer's weights, "
    "mean over heads. (Measured before on MiniLM's sentence embeddings, a mean over all positions where the paper "
    "reads one: -0.42 for rollout, -0.26 for flow, both reversed. With this task, a first run was broken off after "
    "three seeds, +0.34, +0.50 and -0.07 for rollout, because the third encoder had stayed at chance and the "
    "others at 0.85; encoders now start from wider weights, and must tell nine in ten.)",
    effect="Spearman correlation, rollout minus raw attention of the last layer",
    measure=measure,
    strong=0.05,
)


if __name__ == "__main__":
    run(CLAIM)
