"""SeqBoat: does a gate that lets some tokens attend keep what attention at every token brings?"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from claims._lab import LAB, Bytes, numbers
from claims.ledger import Claim, run
from heedful.methods import SeqBoat

COURSE = Bytes(tokens=131_072)
KEPT = 0.9  # of what attention brings


class _Counted(SeqBoat):
    """The same, and tells how many tokens attend."""

    shares: ClassVar[list[float]] = []

    def gate(self, routes: Tensor) -> Tensor:
        found = super().gate(routes)
        self.shares.append(float((found > 0).float().mean()))
        return found


class _Always(SeqBoat):
    """Every token attends."""

    def gate(self, routes: Tensor) -> Tensor:
        return torch.ones_like(routes[..., 0])


class _Never(SeqBoat):
    """None does, and averages are left."""

    def gate(self, routes: Tensor) -> Tensor:
        return torch.zeros_like(routes[..., 0])


def of(kind: type[SeqBoat]) -> SeqBoat:
    return kind(32, 8, 64, 128)


WAYS = {"chosen tokens": of(_Counted), "all tokens": of(_Always), "none": of(_Never)}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss", course=COURSE)
    with LAB.opened(COURSE, WAYS["chosen tokens"], seed) as opened:
        _Counted.shares.clear()
        COURSE.loss(opened, seed)
    found["share that attends"] = sum(_Counted.shares) / len(_Counted.shares)
    brings = found["loss, none"] - found["loss, all tokens"]
    kept = max(KEPT, found["share that attends"])  # nothing is saved where all attend
    return found["loss, none"] - found["loss, chosen tokens"] - kept * brings, found


CLAIM = Claim(
    key="P291",
    method="SeqBoat",
    says="A gate that lets some tokens attend keeps what attention brings, at a share of its cost.",
    paper_number="best among hybrid models of linear cost on long ranges, speech and language (abstract)",
    setup=f"The lab's text course, {COURSE.steps} steps, with blocks of 8 averages a channel in which tokens attend "
    "that a learned gate chooses, or all of them, or none; loss on another held-out tenth a seed, and the share of "
    "tokens that attend there.",
    effect=f"nats a byte that chosen tokens gain over none, less {KEPT:.0%} of what all tokens gain, or their share of "
    "tokens if that is more",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
