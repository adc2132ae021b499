"""SaaS: are instructions followed that a unified model neglects, if their words are given what the source takes?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._edits import STEPS, edited, edits, followed
from claims._pictures import SIDE
from claims.ledger import Claim, run
from heedful.authoring import Region, Stack
from heedful.methods import SaaS

PICTURES, SHARE = 16, 0.8
METHOD = SaaS(instructions=("left", "right", "ground"))


class _Strewn(SaaS):
    """The control: the same factors, at as many places that are dealt anew."""

    def factors(self, looks: Tensor, region: Region) -> Tensor:
        found = super().factors(looks, region)
        return found[:, torch.randperm(found.shape[1], generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    by = torch.Generator().manual_seed(700 + seed)
    source, words, new, shown = edits(PICTURES, by, SHARE)
    noise = torch.randn(PICTURES, 3, SIDE, SIDE, generator=by)
    ways = {"SaaS": METHOD, "as it is": Stack(()), "strewn": _Strewn(instructions=METHOD.instructions)}
    numbers: dict[str, float] = {}
    for name, way in ways.items():
        made = edited(way, source, words, noise)
        numbers |= {f"{what}, {name}": share for what, share in followed(made, words, shown).items()}
        numbers[f"error, {name}"] = float((made - new).square().mean())
    best = max(numbers["asked for, as it is"], numbers["asked for, strewn"])
    return 100 * (numbers["asked for, SaaS"] - best), numbers


CLAIM = Claim(
    key="P278",
    method="SaaS",
    says="Instructions that a unified model neglects beside a source picture are followed if their words are given "
    "what the source takes where they act.",
    paper_number="none in the abstract, which says that instructions are followed better than with other methods",
    setup=f"A diffusion transformer of 0.2M parameters, trained for {STEPS} steps, has words, a 16 x 16 picture of "
    f"two things and its edited copy in one sequence, in place of OmniGen; {PICTURES} pictures a seed and three "
    f"instructions, for either thing and the ground, {SHARE:.0%} of whose words ask for something new. Settings are "
    "the authors', in all layers. Against the model as it is, and against the same factors at as many places that are "
    "dealt anew. Details: what was to stay as it is, and the squared error to the edited copy.",
    effect="words in a hundred that were asked for and are shown, above the better control",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
