"""Polarized self-attention: does a gate of channels and one of patches name digits better than a plain gate or none?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._lab import DIGITS, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Layer, Method, Site, at
from heedful.kit.feature_maps import drawn
from heedful.kit.patches import patch_tokens
from heedful.methods import PolarizedSelfAttention


class _Squeezed(Method):
    """The control: channels alone are gated, by the mean patch through two maps, with as many weights."""

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        return {name: drawn(random, layer.width, layer.width) for name in ("in", "out")}

    @at(Site.OUTPUT)
    def gate(self, output: Tensor, call: Call) -> Tensor:
        tokens = patch_tokens(self, call)
        patches = output[:, tokens]
        gate = ((patches.mean(1, keepdim=True) @ call.params["in"].mT).relu() @ call.params["out"].mT).sigmoid()
        return output.index_copy(1, tokens, patches * gate)


WAYS = {
    "attention": None,
    "polarized": PolarizedSelfAttention(),
    "in a chain": PolarizedSelfAttention(True),
    "squeezed": _Squeezed(),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "accuracy", "shifted", course=DIGITS)
    other = max(found["accuracy, attention"], found["accuracy, squeezed"])
    return 100 * (found["accuracy, polarized"] - other), found


CLAIM = Claim(
    key="P250",
    method="PolarizedSelfAttention",
    says="A gate of channels and one of patches, each told by half the channels, improve what a model makes of images.",
    paper_number="2 to 4 points above baselines, in pose estimation and segmentation (abstract)",
    setup=f"The lab's digits, {DIGITS.steps} steps of a vision transformer of {DIGITS.layers} layers; behind the "
    "attention of each the two gates side by side, none, or a gate of channels by squeeze and excitation with as many "
    "weights. Accuracy on another held-out third a seed. Details: the gates in a chain. The paper's tasks, which want "
    "an answer for each pixel, are not part of it. The first run, not changed after it was seen.",
    effect="points of accuracy above the better of none and squeeze and excitation",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
