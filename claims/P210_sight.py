"""GreedyPrune before a language model: do salient patches unlike each other answer more than either alone?"""

from __future__ import annotations

from claims._fewer_seen import SETUP, answers
from claims.ledger import Claim, run
from heedful.methods import GreedyPrune

UNLIKE = 1e6  # beside which saliency decides nothing but the first patch


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ways = {"both": GreedyPrune(), "saliency": GreedyPrune(diversity=0.0), "diversity": GreedyPrune(diversity=UNLIKE)}
    found = answers(seed, ways)
    one = max(found["log-probability, saliency"], found["log-probability, diversity"])
    return found["log-probability, both"] - one, found


CLAIM = Claim(
    key="P210_sight",
    method="GreedyPrune",
    says="A language model answers better from patches chosen by saliency and diversity than by one of them.",
    paper_number="none given in the abstract: state of the art in accuracy",
    setup=f"{SETUP} Against the better of the most salient patches and of the most unlike. Details: as many drawn at "
    "random. Saliency is what the encoder's tokens give a patch; the authors', by others' accounts, is its likeness to "
    "the question.",
    effect="log-probability of the right answer, above the better of saliency and diversity alone",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
