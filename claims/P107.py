"""Enhanced linear attention: does its local module name digits better than linear attention without neighbours?"""

from __future__ import annotations

from torch import Tensor

from claims._lab import DIGITS, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call
from heedful.methods import EnhancedLinearAttention

KERNEL = 3


class _Alone(EnhancedLinearAttention):
    """Linear attention without the module."""

    def concentrate(self, output: Tensor, call: Call) -> Tensor:
        return output


WAYS = {
    "with the module": EnhancedLinearAttention(KERNEL),
    "without neighbours": EnhancedLinearAttention(1),  # the same module, of kernels that reach no other patch
    "alone": _Alone(KERNEL),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "accuracy", "shifted", course=DIGITS)
    best = max(found["accuracy, without neighbours"], found["accuracy, alone"])
    return 100 * (found["accuracy, with the module"] - best), found


CLAIM = Claim(
    key="P107",
    method="EnhancedLinearAttention",
    says="Linear attention in images lacks concentration, and convolutions behind it make up for that.",
    paper_number="84.4 % on ImageNet without extra data (abstract), of the whole model",
    setup=f"The lab's digits, {DIGITS.steps} steps, ReLU features in all layers; kernels of {KERNEL} x {KERNEL} "
    "patches against the same module of kernels of one patch, and against none. Accuracy on held-out digits. Details: "
    "digits where none stood in training.",
    effect="points of accuracy above the better of a module without neighbours and none",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
