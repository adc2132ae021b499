"""GreedyPrune in a language model: do salient patches unlike each other answer more than either alone?"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from claims._sight import LANGUAGE, asked, log_probability, share_right, told
from claims.ledger import Claim, run
from claims.P210 import Unlike
from heedful.methods import GreedyPrune

PICTURES, NOISE, SHARE, LAYER = 150, 0.3, 0.25, 1


class _Drawn(GreedyPrune):
    """As many patches, drawn at random."""

    seed: int = 0

    def choose(self, patches: Tensor, asked: Tensor) -> Tensor:
        by = torch.Generator().manual_seed(self.seed)
        place = torch.rand(patches.shape[:2], generator=by).argsort(1).argsort(1)
        return place < ceil(self.share * patches.shape[1])


def measure(seed: int) -> tuple[float, dict[str, float]]:
    item = asked(seed, PICTURES, NOISE)
    ways = {
        "all": None, "both": GreedyPrune(LAYER, SHARE), "saliency": GreedyPrune(LAYER, SHARE, alike=1.0),
        "diversity": Unlike(LAYER, SHARE), "drawn": _Drawn(LAYER, SHARE, seed=seed),
    }  # fmt: skip
    found = {}
    for name, way in ways.items():
        logits = told(item.inputs, way)
        found[f"log-probability, {name}"] = log_probability(logits, item.answers)
        found[f"right, {name}"] = share_right(logits, item.answers)
    one = max(found["log-probability, saliency"], found["log-probability, diversity"])
    return found["log-probability, both"] - one, found


CLAIM = Claim(
    key="P210_sight",
    method="GreedyPrune",
    says="A language model answers better from patches chosen by saliency and diversity than by one of them.",
    paper_number="none given in the abstract: state of the art in accuracy",
    setup=f"A vision-language model of LLaVA's class with 0.3M parameters, {PICTURES} noisy 16 x 16 pictures of two "
    f"things a seed, and a question about one of them; {SHARE:.0%} of the patches, chosen in the second of the "
    f"language model's {len(LANGUAGE)} layers, for the two behind it. Against the better of the most salient patches "
    "and of the most unlike. Details: as many drawn at random. (Measured before with what the encoder's tokens give a "
    "patch for its saliency, and a weighted sum, in the encoder: -1.8, reversed.)",
    effect="log-probability of the right answer, above the better of saliency and diversity alone",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
