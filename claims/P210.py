"""GreedyPrune: do salient patches unlike each other tell more than the most salient, or the most unlike?"""

from __future__ import annotations

from claims._fewer_patches import DRAWS, LAYER, SHOWN, cosines
from claims.ledger import Claim, run
from heedful.methods import GreedyPrune

SHARE = 0.1  # few, where the paper sees the most to gain
UNLIKE = 1e6  # beside which saliency decides nothing but the first patch


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ways = {"both": GreedyPrune(), "saliency": GreedyPrune(diversity=0.0), "diversity": GreedyPrune(diversity=UNLIKE)}
    numbers = cosines(seed, ways, SHARE)
    return numbers["both"] - max(numbers["saliency"], numbers["diversity"]), numbers


CLAIM = Claim(
    key="P210",
    method="GreedyPrune",
    says="Patches chosen greedily by saliency and diversity together serve better than those chosen by one of them.",
    paper_number="none given in the abstract: state of the art in accuracy",
    setup=f"DINOv2-S/14, {SHOWN} crops of a photograph with a disc of another one in each; patches chosen in layer "
    f"{LAYER}, and the last layer, which sees {SHARE:.0%} of them, stands for a language model. How near its class "
    "token is to that of the whole image, against the better of the most salient patches and of the most unlike. "
    f"Details: as many patches drawn at random, {DRAWS} times. Saliency is what the encoder's tokens give a patch; the "
    "authors', by others' accounts, is its likeness to the question.",
    effect="cosine with the class token of the whole image, above the better of saliency and diversity alone",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
