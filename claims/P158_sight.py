"""AvisC on pictures: does a contrast with the patches that a model stares at keep it from guessing the usual?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._sight import LANGUAGE, PATCHES, guessed, guesses, looks, model, told
from claims.ledger import Claim, run
from heedful import attach
from heedful.kit.picked import best
from heedful.methods import AvisC
from heedful.methods.intervene.vision._against import LITTLE, PROMPT
from heedful.methods.intervene.vision.avisc import _Emptied

PICTURES, NOISE = 150, 1.0
FIRST = LANGUAGE[0]


def emptied(inputs: dict[str, Tensor], kept: Tensor) -> Tensor:
    """The logits `[n v]` where the language model is shown zeros for all patches but some of each picture `[n 64]`."""
    rows = []
    for row, seen in enumerate(kept):
        places = tuple(1 + place for place in (~seen).nonzero().flatten().tolist())
        with attach(model(), _Emptied(places).on(layers=FIRST)) as run:
            rows.append(run(**{name: x[row : row + 1] for name, x in inputs.items()}).logits[0, -1])
    return torch.stack(rows)


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    inputs, answers, usual = guessed(seed, PICTURES, NOISE)
    method, by = AvisC(beta=0.0), torch.Generator().manual_seed(seed)
    blind = torch.stack([method.blind(each) for each in looks(inputs)])
    drawn = torch.stack([best(torch.rand(PATCHES, generator=by), int(each.sum())) for each in blind])
    plain = told(inputs)
    ways = {"plain": plain}
    for name, kept in {"AvisC": blind, "as many drawn": drawn, "none left": torch.zeros_like(blind)}.items():
        pairs = zip(plain, emptied(inputs, kept), strict=True)
        ways[name] = torch.stack([method.combine({PROMPT: x, LITTLE: y}) for x, y in pairs])
    found = guesses(ways, answers, usual)
    found["share left in the contrast"] = float(blind.double().mean())
    return found["right, AvisC"] - max(found["right, plain"], found["right, as many drawn"]), found


CLAIM = Claim(
    key="P158_sight",
    method="AvisC",
    says="A contrast with the patches alone at which a model stares makes it say what is there.",
    paper_number="none given in the abstract: better than other ways of decoding on POPE, MME and AMBER",
    setup=f"A vision-language model of LLaVA's class with 0.3M parameters, trained on things that mostly have the "
    f"shape which goes with their colour; {PICTURES} very noisy pictures a seed of things that have not. Their colour "
    "is told and their shape asked for; the likeliest of the four counts. The paper's settings, without the cut-off; "
    f"all patches but the blind ones come in as zeros, and a picture's blind ones are told by heads averaged. Against "
    "no contrast and one with as many patches left, drawn at random, whichever is better. Details: none left.",
    effect="points of questions answered rightly, over no contrast or a random one",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
