"""FFNified attention: do two convolutions and a GELU between name digits better than attention?"""

from __future__ import annotations

from claims._lab import DIGITS, numbers
from claims._pooled import BEFORE, END
from claims.ledger import Claim, run
from heedful.methods import FFNifiedAttention

KERNEL = 3  # of 6 patches along a side; the paper: 7 of 14


WAYS = {
    "attention": END,
    "FFNified": FFNifiedAttention(KERNEL).on(layers=BEFORE) | END,
    "without neighbours": FFNifiedAttention(1).on(layers=BEFORE) | END,
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "accuracy", "shifted", course=DIGITS)
    return 100 * (found["accuracy, FFNified"] - found["accuracy, attention"]), found


CLAIM = Claim(
    key="P047",
    method="FFNifiedAttention",
    says="What counts is that queries meet keys and values, not how: with convolutions for both and a GELU between, a "
    "vision model names images better than with attention.",
    paper_number="improves over earlier models on a wide range of tasks (abstract, which gives no figure)",
    setup=f"The lab's digits, {DIGITS.steps} steps of a vision transformer of {DIGITS.layers} layers, whose last "
    "hands every token the mean of all, as the authors' models end; before it attention, or FFNified attention with "
    f"kernels of {KERNEL} x {KERNEL} patches. Accuracy on another held-out third a seed. Details: "
    "kernels of one patch. The first run, not changed after it was seen.",
    effect="points of accuracy above attention",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
