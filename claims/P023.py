"""SLA: after a little fine-tuning, do exact blocks and linear attention name digits better than either alone?"""

from __future__ import annotations

from torch import Tensor

from claims._digits import LAYERS, SIDE, taught
from claims._linear import Divided
from claims.ledger import Claim, run
from heedful.authoring import Call, Part, Stack
from heedful.methods import SLA

STEPS, MORE = 200, 60
EXACT, SKIPPED, SIZE = 0.1, 0.1, 4  # of 37 tokens ten blocks, one of them exact and one skipped


class _Exact(SLA):
    """The exact blocks, and no linear attention beside."""

    def add_linear(self, heads: Tensor, call: Call) -> Tensor:
        return heads


class _Linear(Divided):
    """SLA's features over all tokens, and no exact blocks."""

    def features(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


WAYS: dict[str, Part | Stack] = {
    "SLA": SLA(EXACT, SKIPPED, SIZE),
    "exact alone": _Exact(EXACT, SKIPPED, SIZE),
    "linear alone": _Linear(),
    "softmax": Stack(),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, before = taught(Stack(), seed, STEPS)
    numbers = {f"accuracy, {name}": taught(what, seed, MORE, model)[1] for name, what in WAYS.items()}
    best = max(numbers["accuracy, exact alone"], numbers["accuracy, linear alone"])
    return 100 * (numbers["accuracy, SLA"] - best), numbers | {"accuracy before": before}


CLAIM = Claim(
    key="P023",
    method="SLA",
    says="A model that is fine-tuned for a little while does better with exact and linear attention joined than with "
    "either alone.",
    paper_number="95 % less computation of attention on Wan2.1-1.3B without loss of quality (abstract)",
    setup=f"A {LAYERS}-layer vision transformer trained {STEPS} steps on scikit-learn's digits with softmax, moved by "
    f"0 to 2 of {SIDE} x {SIDE} patches, and {MORE} steps more under each way; of ten blocks of {SIZE} tokens one is "
    "exact, one skipped. Held-out accuracy. Details: softmax fine-tuned as long, and the model before.",
    effect="points of accuracy above the better of exact blocks alone and linear attention alone",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
