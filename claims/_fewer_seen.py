"""What a small vision-language model answers when it sees some of an image's patches alone, for several claims."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from claims._sight import SHOWN, asked, log_probability, share_right, told
from heedful.authoring import Call
from heedful.kit.picked import PickedPatches, best

PICTURES, NOISE, SHARE = 150, 0.3, 0.25
SETUP = (
    f"A vision-language model of LLaVA's class with 0.3M parameters, {PICTURES} noisy 16 x 16 pictures of two things a "
    f"seed, and a question about one of them; {SHARE:.0%} of the patches, chosen in the layer of the encoder that the "
    "language model reads."
)


class _Drawn(PickedPatches):
    """The control: as many patches, drawn at random."""

    seed: int = 0

    def choose(self, weights: Tensor, call: Call) -> Tensor:
        where, by = self.patches(call), torch.Generator().manual_seed(self.seed)
        count = where.stop - where.start
        return best(torch.rand(len(weights), count, generator=by), ceil(self.share * count))


def answers(seed: int, ways: dict[str, PickedPatches]) -> dict[str, float]:
    """How likely the right answer is, for each way of choosing, for patches drawn and for all of them."""
    item = asked(seed, PICTURES, NOISE)
    each = {name: replace(way, layer=SHOWN, share=SHARE) for name, way in ways.items()}
    found = {}
    for name, way in {"all": None, **each, "drawn": _Drawn(SHOWN, SHARE, seed=seed)}.items():
        logits = told(item.inputs, way)
        found[f"log-probability, {name}"] = log_probability(logits, item.answers)
        found[f"right, {name}"] = share_right(logits, item.answers)
    return found
