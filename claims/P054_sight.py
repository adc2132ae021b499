"""VHR on pictures: does scaling up the heads that the picture matters to keep a model from guessing the usual?"""

from __future__ import annotations

import torch

from claims._sight import LANGUAGE, guessed, guesses, told
from claims.ledger import Claim, run
from heedful.core.call import Call
from heedful.methods import VHR

PICTURES, NOISE = 150, 1.0
LATE = LANGUAGE[2:]  # half of the layers, as the authors' last 14 of 32


class _Random(VHR):
    """As many heads, drawn at random for each picture."""

    paper = VHR.paper

    def choose(self, call: Call) -> torch.Tensor:
        chosen = super().choose(call)
        return chosen.gather(-1, torch.rand(chosen.shape).argsort(-1))


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    torch.manual_seed(seed)
    inputs, answers, usual = guessed(seed, PICTURES, NOISE)
    ways = {"VHR": VHR(role="image"), "random heads": _Random(role="image"), "half": VHR(role="image", alpha=0.5)}
    heard = {"plain": told(inputs)} | {name: told(inputs, way.on(layers=LATE)) for name, way in ways.items()}
    found = guesses(heard, answers, usual)
    return found["right, VHR"] - max(found["right, plain"], found["right, random heads"]), found


CLAIM = Claim(
    key="P054_sight",
    method="VHR",
    says="Doubling the outputs of the heads that the picture changes most makes a model say what is there.",
    paper_number="CHAIR_S 49.7 to 33.3 (LLaVA-1.5-7B)",
    setup=f"A vision-language model of LLaVA's class with 0.3M parameters, trained on things that mostly have the "
    f"shape which goes with their colour; {PICTURES} very noisy pictures a seed of things that have not. Their colour "
    "is told and their shape asked for; the likeliest of the four counts. The last two of four layers. Against no edit "
    "and as many heads drawn at random, whichever is better. Details: the same heads halved.",
    effect="points of questions answered rightly, over no edit or random heads",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
