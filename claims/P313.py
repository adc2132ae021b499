"""Sigmoid attention: does a bias of -log n let it train as well as softmax?"""

from __future__ import annotations

from claims._tiny_lm import LENGTH, HeadNorm, Trained, fresh, read
from claims.ledger import Claim, run
from heedful.methods.mechanisms.normalise.sigmoid_attention import SigmoidAttention

STEPS = 200
MARGIN = 0.02  # of softmax's loss, fixed before anything was measured: what we still call a match


def measure(seed: int) -> tuple[float, dict[str, float]]:
    norm = HeadNorm()
    numbers = {"norm before training, softmax": float(read(fresh(seed), norm, norm))}
    ways = {"softmax": None, "bias -log n": SigmoidAttention(LENGTH), "no bias": SigmoidAttention(1)}
    for name, way in ways.items():
        numbers[f"loss, {name}"] = Trained(way, seed, STEPS).loss()
        if way is not None:
            numbers[f"norm before training, {name}"] = float(read(fresh(seed), way | norm, norm))
    soft = numbers["loss, softmax"]
    return (1 + MARGIN) * soft - numbers["loss, bias -log n"], numbers


CLAIM = Claim(
    key="P313",
    method="SigmoidAttention",
    says="Sigmoid attention with a bias of -log n and no row normalisation matches softmax.",
    paper_number="on par on language, vision and speech; no bias gives large first outputs and trains worse",
    setup=f"A 2-layer byte model trained {STEPS} steps on Python's documentation with softmax, with sigmoid and bias "
    "-log n, and without bias; held-out loss. A match is a loss at most 2 % above softmax's.",
    effect="nats a byte left below softmax's loss plus 2 %",
    measure=measure,
    seeds=3,
)

if __name__ == "__main__":
    run(CLAIM)
