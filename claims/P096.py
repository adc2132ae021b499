"""RankedHeads: can many heads of a low rank find a nearest neighbour as one head of full rank does?"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from claims.ledger import Claim, run
from heedful.kit.feature_maps import drawn as drawn_evenly
from heedful.methods import RankedHeads
from heedful.nn import Attention

WIDTH, TOKENS = 16, 8
STEPS, ROWS, RATE, ASKED = 500, 128, 1e-2, 2000
WAYS = {"one of full rank": (16, 1), "as many weights": (4, 4), "four times the weights": (4, 16)}  # rank, heads


def drawn(count: int, random: Generator) -> tuple[Tensor, Tensor]:
    """Points on the sphere, and for each the one that is nearest to its opposite: none is its own answer."""
    x = torch.nn.functional.normalize(torch.randn(count, TOKENS, WIDTH, generator=random), dim=-1)
    found = (x @ x.mT).argmin(-1)
    return x, x.gather(1, found[..., None].expand(-1, -1, WIDTH))


def error(rank: int, heads: int, seed: int) -> float:
    """The squared distance from the right point, of a layer trained to say it; 1 is what saying nothing errs by."""
    random = Generator().manual_seed(seed)
    layer = Attention(WIDTH, 1, RankedHeads(rank, heads), bias=False, batch_first=True)
    learned = [p for name, p in layer.named_parameters() if "proj" not in name]
    with torch.no_grad():
        for p in learned:
            p.copy_(drawn_evenly(random, *p.shape))
    optimiser = torch.optim.Adam(learned, lr=RATE)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        x, wanted = drawn(ROWS, random)
        loss = (layer(x, x, x)[0] - wanted).square().sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        x, wanted = drawn(ASKED, random)
        return float((layer(x, x, x)[0] - wanted).square().sum(-1).mean())


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = {f"error, {name}": error(rank, heads, seed) for name, (rank, heads) in WAYS.items()}
    return math.log(found["error, four times the weights"] / found["error, one of full rank"]), found


CLAIM = Claim(
    key="P096",
    method="RankedHeads",
    says="One head of full rank finds the nearest of some points on the sphere; heads of low rank cannot, unless "
    "there are exponentially many.",
    paper_number="a theorem; exponential in width over rank",
    setup=f"One layer in {WIDTH} dimensions, trained {STEPS} steps to say for each of {TOKENS} points on the sphere "
    "which of them is nearest to its opposite, so that no point is its own answer. One head of rank 16 against four "
    "of rank 4, which have as many weights, and 16 of rank 4, which have four times as many. Squared distance on "
    f"{ASKED} fresh sets; weights and points are drawn anew for each seed. Trained models can only suggest what none "
    "can do. (A sketch without the class, over 800 steps, was tried once: errors of 0.13, 0.67 and 0.57.)",
    effect="log of the error with four times the weights at rank 4, over that of one head of full rank",
    measure=measure,
    strong=0.5,
)

if __name__ == "__main__":
    run(CLAIM)
