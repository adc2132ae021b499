"""AGLA: does adding what a model says of the relevant part keep it from guessing the usual?"""

from __future__ import annotations

import torch

from claims._sight import IMAGE, PATCHES, guessed, guesses, hiding, looks, told
from claims.ledger import Claim, run
from heedful.methods import AGLA
from heedful.methods.intervene.vision._against import LITTLE, PROMPT
from heedful.methods.intervene.vision._looks import lowest

PICTURES, NOISE = 150, 1.0
PLACES = tuple(range(*IMAGE[0]))


def measure(seed: int) -> tuple[float, dict[str, float]]:
    inputs, answers, usual = guessed(seed, PICTURES, NOISE)
    method, by = AGLA(beta=0.0), torch.Generator().manual_seed(seed)
    scores = {"relevant": looks(inputs).mean(1), "drawn": torch.rand(PICTURES, PATCHES, generator=by)}
    logits = {"plain": told(inputs)}
    for name, each in scores.items():
        logits[name] = hiding(inputs, [lowest(PLACES, score, method.share) for score in each])
    ways = {"plain": logits["plain"], "relevant part alone": logits["relevant"]}
    for name, part in (("AGLA", "relevant"), ("with a part drawn", "drawn")):
        pairs = zip(logits["plain"], logits[part], strict=True)
        ways[name] = torch.stack([method.combine({PROMPT: x, LITTLE: y}) for x, y in pairs])
    found = guesses(ways, answers, usual)
    others = max(share for name, share in found.items() if name.startswith("right") and name != "right, AGLA")
    return found["right, AGLA"] - others, found


CLAIM = Claim(
    key="P121",
    method="AGLA",
    says="Adding what is said of the relevant part of an image to what is said of the whole makes answers right.",
    paper_number="none given in the abstract: fewer hallucinations, on several benchmarks",
    setup=f"A vision-language model of LLaVA's class with 0.3M parameters, trained on things that mostly have the "
    f"shape which goes with their colour; {PICTURES} very noisy pictures a seed of things that have not. Their colour "
    "is told and their shape asked for; the likeliest of the four counts, without a cut-off. Half of the patches are "
    "relevant. Against the whole alone, the relevant part alone, and the sum with a part drawn at random, whichever is "
    "best.",
    effect="points of questions answered rightly, above the best control",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
