"""FFTNet: is a filter of frequencies that is learned and adapts better than none, and than attention?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._lab import DIGITS, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Method, Site, at
from heedful.methods import FFTNet

TOKENS = 37  # patches and the class token


class _FNet(Method):
    """The control: Fourier's transform over channels and places, of which the real part goes on."""

    @at(Site.BLOCK)
    def transform(self, hidden: Tensor, call: Call) -> Tensor:
        return torch.fft.fft2(hidden).real


WAYS = {"softmax": None, "FFTNet": FFTNet(TOKENS), "fixed": _FNet()}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "accuracy", "shifted", course=DIGITS)
    return found["accuracy, FFTNet"] - max(found["accuracy, softmax"], found["accuracy, fixed"]), found


CLAIM = Claim(
    key="P099",
    method="FFTNet",
    says="An adaptive filter of frequencies is better than fixed Fourier mixing and than attention.",
    paper_number="superior to both on Long Range Arena and ImageNet (abstract, which gives no figure)",
    setup=f"The lab's digits, {DIGITS.steps} steps of a vision transformer of {DIGITS.layers} layers with softmax "
    "attention, with FFTNet, and with a fixed transform over channels and places; accuracy on another held-out third "
    "a seed. The first run, not changed after it was seen.",
    effect="accuracy above the better of softmax attention and the fixed transform",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
