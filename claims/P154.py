"""Large kernel convolutional attention: after few steps, does a kernel name digits as well as softmax, or better?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._lab import DIGITS, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call
from heedful.kit.patches import sides
from heedful.laboratory.images import SIDE
from heedful.methods import LKCA

SIZE = 2 * SIDE - 1  # reaches from corner to corner


class _Shuffled(LKCA):
    """The control: the same kernels on a grid whose patches are shuffled, once and for all."""

    def places(self, at: Tensor, call: Call) -> Tensor:
        rows, cols = sides(call)
        where = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(0)).to(at.device)
        new = where[(at[..., 0] * cols + at[..., 1]).clamp(min=0)]
        return torch.stack([new // cols, new % cols], -1)


WAYS = {"softmax": None, "LKCA": LKCA(SIZE), "shuffled": _Shuffled(SIZE)}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "accuracy", "shifted", course=DIGITS)
    return found["accuracy, LKCA"] - max(found["accuracy, softmax"], found["accuracy, shuffled"]), found


CLAIM = Claim(
    key="P154",
    method="LKCA",
    says="One large kernel a head in attention's place is as good as softmax attention, and better where data are few.",
    paper_number="competitive in classification and segmentation (abstract, without numbers)",
    setup=f"The lab's digits, {DIGITS.steps} steps, with softmax, with kernels of {SIZE} by {SIZE} offsets, and with "
    "the same kernels on a grid whose patches are shuffled; accuracy on another held-out third a seed.",
    effect="share of digits right, less the better of softmax and shuffled kernels",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
