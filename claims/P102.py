"""InLine attention: does normalising by subtraction do better than by division, beside the same local kernel?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._digits import LAYERS, SIDE, accuracy_of
from claims._linear import Elu
from claims._tiny_lm import HeadNorm
from claims.ledger import Claim, run
from heedful import Method, Site, Stack
from heedful.authoring import Call, Layer, at
from heedful.methods import InLine

STEPS = 300


class _Divided(Method):
    """The control: features ELU + 1 divided by their sum, and InLine's own local kernel."""

    paper = HeadNorm.paper

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return InLine().parameters(layer)

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        near = InLine().local(call, qkv[2])
        if near is None:
            raise RuntimeError("the digits' patches have no grid")
        return Elu().attend(qkv, call) + near


class _Bare(Method):
    """Subtraction without the local kernel."""

    paper = HeadNorm.paper

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = qkv
        s = q @ k.mT * call.scale / k.shape[2]
        return (s - s.mean(-1, keepdim=True) + 1 / k.shape[2]) @ v


def measure(seed: int) -> tuple[float, dict[str, float]]:
    torch.manual_seed(seed)
    ways = {"InLine": InLine(), "division": _Divided(), "no kernel": _Bare(), "softmax": Stack()}
    numbers = {f"accuracy, {name}": accuracy_of(what, seed, STEPS) for name, what in ways.items()}
    return 100 * (numbers["accuracy, InLine"] - numbers["accuracy, division"]), numbers


CLAIM = Claim(
    key="P102",
    method="InLine",
    says="Linear attention that is normalised by subtraction, and so tells unlike queries apart, does better.",
    paper_number="none given in the abstract; InLine outperforms softmax attention",
    setup=f"A {LAYERS}-layer vision transformer trained {STEPS} steps on scikit-learn's digits, moved by 0 to 2 of "
    f"{SIDE} x {SIDE} patches, with InLine and with ELU + 1 features divided by their sum beside the same kernel; "
    "held-out accuracy. Details: InLine without its kernel, and softmax.",
    effect="points of accuracy above division by the sum",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
