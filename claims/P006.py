"""V2P: do a Gaussian target and a penalty on the rest make a model point at the middle of what is asked for?"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from claims._pictures import GRID
from claims._sight import BATCH, IMAGE, PATCHES, asked, model
from claims.ledger import Claim, run
from heedful import attach
from heedful.authoring import Call, Method, Site, reads
from heedful.core.entry import Readings
from heedful.core.regions import Region
from heedful.core.stats import Cat
from heedful.methods import V2P

LAYER, STEPS, RATE, NOISE, SHOWN = 5, 80, 1e-3, 0.5, 300
PICTURE = Region(IMAGE, (GRID, GRID))


class _Uniform(V2P):
    """The control: every patch of the box is to have as much."""

    def shares(self, gaussian: Tensor) -> Tensor:
        return torch.ones_like(gaussian)


class _Pointing(Method):
    """What the last tokens of prompts give to patches, heads averaged."""

    paper = V2P.paper

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Cat:
        return Cat.of(f"{call.rows.start:09d}", weights[:, :, -1, 1 : 1 + PATCHES].mean(1))

    def answer(self, readings: Readings) -> Tensor:
        (found,) = readings.values()
        return found.value[-1]


WAYS = {"V2P": V2P(), "uniform": _Uniform(suppression=0.0)}


def spans(things: Tensor) -> list[dict[str, tuple[tuple[int, int], ...]]]:
    """The patches of each picture's thing, as roles."""
    begin = IMAGE[0][0]
    return [{"target": tuple((begin + i, begin + i + 1) for i in row.nonzero()[:, 0].tolist())} for row in things]


def middle(things: Tensor) -> tuple[Tensor, Tensor]:
    """The middle and the half sides of the box around each thing, `[n 2]`, in patches."""
    grid = things.unflatten(-1, (GRID, GRID))
    ends = []
    for other in (2, 1):
        line = grid.any(other).float()
        first, last = line.argmax(1), GRID - 1 - line.flip(1).argmax(1)
        ends.append((first, last + 1))
    low, high = (torch.stack([one[i] for one in ends], 1).double() for i in (0, 1))
    return (low + high) / 2, (high - low) / 2


def pointed(method: Method, seed: int) -> dict[str, float]:
    """A copy of the model trained on answers and the penalty; where it looks in pictures that it has not seen."""
    student = copy.deepcopy(model()).requires_grad_(True)
    optimiser = torch.optim.Adam(student.parameters(), lr=RATE)
    first = asked(100_000 * (seed + 1), BATCH, NOISE)
    roles = [{"patches": PICTURE, **one} for one in spans(first.things)]
    with attach(student, method.on(layers=(LAYER,)), roles=roles) as attached:
        for step in range(STEPS):
            item = asked(100_000 * (seed + 1) + step, BATCH, NOISE)
            attached.roles = [{"patches": PICTURE, **one} for one in spans(item.things)]
            optimiser.zero_grad()
            logits = attached(**item.inputs).logits[:, -1]
            (F.cross_entropy(logits, item.answers) + attached.loss()).backward()
            optimiser.step()
    tried = asked(seed, SHOWN, NOISE)
    reader = _Pointing().on(layers=(LAYER,))
    with torch.no_grad(), attach(student, reader) as attached:
        right = (attached(**tried.inputs).logits[:, -1].argmax(-1) == tried.answers).double().mean()
        looks = attached[reader].double()
    highest = looks.argmax(-1)
    point = torch.stack([highest // GRID, highest % GRID], 1) + 0.5
    centre, half = middle(tried.things)
    away = (point - centre).abs()
    inside = (looks * tried.things).sum(-1) / looks.sum(-1)
    return {
        "in the middle": 100 * float((away <= 0.5).all(1).double().mean()),
        "in the box": 100 * float((away < half).all(1).double().mean()),
        "attention on the thing": float(inside.mean()),
        "answers right": float(right),
    }


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = {}
    with torch.enable_grad():
        for name, method in WAYS.items():
            numbers |= {f"{what}, {name}": x for what, x in pointed(method, seed).items()}
    return numbers["in the middle, V2P"] - numbers["in the middle, uniform"], numbers


CLAIM = Claim(
    key="P006",
    method="V2P",
    says="A penalty on attention outside the box, and a Gaussian in it as the target, make a model point more surely "
    "at what is asked for than a target that is even over the box.",
    paper_number="92.4 % on ScreenSpot-v2, 52.5 % on ScreenSpot-Pro (abstract)",
    setup=f"The small vision-language model that answers questions about pictures of two things, trained {STEPS} "
    f"steps further on answers and on the attention of the prompt's last token in layer {LAYER}: V2P, and an even "
    f"target over the thing's box without the penalty. Where that token looks most, in {SHOWN} unseen pictures. "
    "Details: how often that lies anywhere in the box, and how often the answer is right.",
    effect="points of pictures, of a hundred, in which the highest patch touches the middle of the box, above an "
    "even target",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
