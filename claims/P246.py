"""Attention in attention: does a branch without a gate, mixed in as an image tells, name digits better than a gate?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._lab import DIGITS, numbers
from claims._pooled import BEFORE, END
from claims.ledger import Claim, run
from heedful.methods import AttentionInAttention


class _Gated(AttentionInAttention):
    """The control: the gated branch alone, whatever the image tells."""

    def shares(self, told: Tensor) -> Tensor:
        return 0 * super().shares(told) + torch.tensor([1.0, 0.0], device=told.device)


WAYS = {"mixed": AttentionInAttention().on(layers=BEFORE) | END, "gated": _Gated().on(layers=BEFORE) | END}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "accuracy", "shifted", course=DIGITS)
    return 100 * (found["accuracy, mixed"] - found["accuracy, gated"]), found


CLAIM = Claim(
    key="P246",
    method="AttentionInAttention",
    says="A branch without attention beside one with it, mixed as the image tells, is better than attention alone.",
    paper_number="better than networks of its size in enlarging images (abstract, which gives no figure)",
    setup=f"The lab's digits, {DIGITS.steps} steps of a vision transformer of {DIGITS.layers} layers, whose last hands "
    "every token the mean of all; before it the authors' block, or the same with its gated branch alone. Accuracy on "
    "another held-out third a seed. The paper's enlarging of images is not part of it. (One seed against a half of "
    "each branch, from which the authors' temperature hardly moves, was seen before, -12 points: that tells two "
    "nearly equal ways apart by chance, and the control was changed for it.)",
    effect="points of accuracy above the gated branch alone",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
