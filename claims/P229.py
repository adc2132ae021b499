"""SparseK: beside local heads, do keys that a small net scores help more than others, or more windows?"""

from __future__ import annotations

from dataclasses import replace

import torch

from claims._lab import BYTES, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Mask, Method, Site, Window, at
from heedful.methods import SparseK

SEEN = 16  # keys that a token sees in each head
SCORED, LOCAL = (2, 3), (0, 1)


class _Near(Method):
    """Local heads."""

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        return mask & Window(SEEN)


class _Drawn(SparseK):
    """The control of the scores: those of what was drawn anew for each call."""

    @at(Site.MASK)
    def choose(self, mask: Mask, call: Call) -> Mask:
        drawn = {name: torch.randn_like(x) for name, x in call.params.items()}
        return super().choose(mask, replace(call, params=drawn))


NEAR = _Near().on(heads=LOCAL)
WAYS = {
    "softmax": None,
    "local": _Near(),
    "local and scored": NEAR | SparseK(SEEN).on(heads=SCORED),
    "local and drawn": NEAR | _Drawn(SEEN).on(heads=SCORED),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss", course=BYTES)
    return min(found["loss, local"], found["loss, local and drawn"]) - found["loss, local and scored"], found


CLAIM = Claim(
    key="P229",
    method="SparseK",
    says="Sparse attention to keys that a learned net scores, beside a window, predicts better than the window alone.",
    paper_number="outperforms previous sparse attention methods in language modelling (abstract, which gives no "
    "figure)",
    setup=f"The lab's text course, {BYTES.steps} steps, texts of {BYTES.length}: windows of {SEEN} in all four "
    f"heads, or in two of them beside two that see the {SEEN} keys of highest score, by a learned net or by one that "
    "is drawn anew for each call; loss on another held-out tenth a seed. Details: softmax over all keys.",
    effect="nats a byte below the better of windows alone and drawn scores",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
