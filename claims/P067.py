"""Bi-level routing attention: do regions that are chosen name digits better than as many that are near, or drawn?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._lab import DIGITS, numbers
from claims.ledger import Claim, run
from heedful.methods import BiLevelRoutingAttention

REGIONS, SEEN = 3, 2  # along each side, and of these nine


class _Near(BiLevelRoutingAttention):
    """The control of the routes: a region's own, and then the nearest, whatever stands there."""

    def _routes(self, q: Tensor, k: Tensor) -> Tensor:
        place = torch.cartesian_prod(torch.arange(self.regions), torch.arange(self.regions)).float()
        return -torch.cdist(place, place).expand(len(q), -1, -1)


class _Drawn(BiLevelRoutingAttention):
    """The same, drawn anew for each call and image."""

    def _routes(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.rand_like(super()._routes(q, k))


WAYS = {
    "softmax": None,
    "all regions": BiLevelRoutingAttention(REGIONS, REGIONS**2),
    "chosen": BiLevelRoutingAttention(REGIONS, SEEN),
    "near": _Near(REGIONS, SEEN),
    "drawn": _Drawn(REGIONS, SEEN),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "accuracy", "shifted", course=DIGITS)
    best = max(found["accuracy, near"], found["accuracy, drawn"])
    return 100 * (found["accuracy, chosen"] - best), found


CLAIM = Claim(
    key="P067",
    method="BiLevelRoutingAttention",
    says="Patches that see the regions which suit their own name images better than those that see fixed ones.",
    paper_number="83.8 % on ImageNet without extra data (abstract)",
    setup=f"The lab's digits, {DIGITS.steps} steps, {REGIONS} x {REGIONS} regions of 2 x 2 patches, of which each sees "
    f"{SEEN}: chosen by means, its own and the nearest, or drawn anew for each image; all with the convolution of "
    "values. Accuracy on held-out digits. Details: all regions, softmax alone, and digits where none stood in "
    "training.",
    effect="points of accuracy above the better of near and drawn regions",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
