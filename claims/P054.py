"""VHR: does scaling up the heads that a marked passage matters to make the model say what that passage says?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._marked import prompts, score
from claims.ledger import Claim, run
from heedful.core.call import Call
from heedful.methods.intervene.vision.vhr import VHR

PROMPTS = 18
LAYERS = [1, *range(17, 30)]  # of 30: the second and the last 13, as the authors' second and last 14 of 32


class _Random(VHR):
    """As many heads, drawn at random."""

    paper = VHR.paper

    def choose(self, call: Call) -> Tensor:
        chosen = super().choose(call)
        return chosen[:, torch.randperm(chosen.shape[1])]


def measure(seed: int) -> tuple[float, dict[str, float]]:
    asked = prompts(seed, PROMPTS)
    ways = {"without": None, "VHR": VHR(), "random heads": _Random()}
    numbers: dict[str, float] = {}
    for name, way in ways.items():
        part = None if way is None else way.on(layers=LAYERS)
        numbers[f"log-probability, {name}"], numbers[f"beats the other, {name}"] = score(asked, part)
    numbers["log-probability, another place marked"], _ = score(asked, VHR().on(layers=LAYERS), elsewhere=True)
    return numbers["log-probability, VHR"] - numbers["log-probability, without"], numbers


CLAIM = Claim(
    key="P054",
    method="VHR",
    says="Doubling the outputs of the heads that the image changes most makes a model say less that is not in it.",
    paper_number="CHAIR_S 49.7 to 33.3 (LLaVA-1.5-7B)",
    setup=f"SmolLM2-135M; {PROMPTS} prompts in which two of 8 lines give a thing different codes and one of them is "
    "marked; layers 1 and 17 to 29. Random heads and another marked place as controls. No vision model was at hand.",
    effect="gain in log-probability of the code that the marked line gives",
    measure=measure,
    seeds=3,
    strong=0.1,
)

if __name__ == "__main__":
    run(CLAIM)
