"""Slot attention: do slots that compete for points find the clusters better than slots that each choose alone?"""

from __future__ import annotations

import math

import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from claims.ledger import Claim, run
from heedful.methods import SlotAttention
from heedful.nn import Attention

CLUSTERS, POINTS, WIDTH, ROUNDS = 4, 40, 32, 3
STEPS, BATCH, RATE, TRIED = 400, 32, 2e-3, 200
MORE = 6  # clusters and slots that no training had
SPREAD = 0.06  # standard deviation of a cluster; centres lie between -1 and 1
LOOKED: list[Tensor] = []  # how much of each point goes to each slot, of the last call's last round


class _Competing(SlotAttention):
    """The method, watched."""

    def _weighed(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, shares = super()._weighed(scores)
        LOOKED[:] = [weights.detach()]
        return weights, shares


class _Choosing(SlotAttention):
    """The control: each slot's softmax is over points, as in attention; what goes back is the same."""

    def _weighed(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, _ = super()._weighed(scores)
        LOOKED[:] = [weights.detach()]
        return weights, scores.softmax(1)


class _Model(nn.Module):
    """Points in, points out, with nothing between but slots."""

    def __init__(self, method: SlotAttention) -> None:
        super().__init__()
        self.into = nn.Sequential(nn.Linear(2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.attention = Attention(WIDTH, 1, method, batch_first=True)
        self.out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))

    def forward(self, points: Tensor) -> Tensor:
        x = self.into(points)
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def _drawn(random: torch.Generator, sets: int, clusters: int) -> tuple[Tensor, Tensor]:
    """Points `[sets n 2]` and the cluster of each."""
    centres = torch.rand(sets, clusters, 2, generator=random) * 2 - 1
    of = torch.randint(clusters, (sets, POINTS), generator=random)
    noise = SPREAD * torch.randn(sets, POINTS, 2, generator=random)
    return centres.gather(1, of[..., None].expand(-1, -1, 2)) + noise, of


@torch.no_grad()
def _agreement(model: _Model, random: torch.Generator, clusters: int) -> float:
    """The adjusted Rand index of the slots that points go to, 1 where these are the clusters."""
    points, of = _drawn(random, TRIED, clusters)
    model(points)
    best = LOOKED[0].argmax(-1)
    return sum(adjusted_rand_score(a, b) for a, b in zip(of.numpy(), best.numpy(), strict=True)) / TRIED


def _trained(kind: type[SlotAttention], seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = _Model(kind(CLUSTERS, ROUNDS, 2 * WIDTH))
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        points, _ = _drawn(random, BATCH, CLUSTERS)
        optimiser.zero_grad()
        (model(points) - points).square().mean().backward()
        optimiser.step()
    found = {"agreement": _agreement(model, random, CLUSTERS)}
    wider = _Model(kind(MORE, ROUNDS, 2 * WIDTH))
    wider.load_state_dict(model.state_dict())
    return found | {f"agreement, {MORE} of {MORE}": _agreement(wider, random, MORE)}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ways = {"competing": _Competing, "choosing": _Choosing}
    found = {f"{what}, {way}": x for way, kind in ways.items() for what, x in _trained(kind, seed).items()}
    return found["agreement, competing"] - found["agreement, choosing"], found


CLAIM = Claim(
    key="P273",
    method="SlotAttention",
    says="Slots that compete for inputs group them by the object that they belong to, without being told.",
    paper_number="objects found without being told, and in unseen combinations (abstract, which gives no figure)",
    setup=f"Sets of {POINTS} points of {CLUSTERS} clusters in a plane go through {CLUSTERS} slots of width {WIDTH} "
    f"and are to come out again, {STEPS} steps; slots compete, or each has a softmax over points, as attention has it. "
    f"Adjusted Rand index of clusters and the slot that each point goes to, on {TRIED} fresh sets. Details: {MORE} "
    "clusters and slots after the same training.",
    effect="adjusted Rand index above that of slots which each choose alone",
    measure=measure,
    strong=0.05,
)

if __name__ == "__main__":
    run(CLAIM)
