"""Continuum attention: do weights that were learned on one grid serve another, if samples count by their quadrature?"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from claims.ledger import Claim, run
from heedful import Method
from heedful.methods import ContinuumAttention
from heedful.nn import Attention

SAMPLES, FINE, WAVES, WIDTH = 32, 1024, 4, 32
STEPS, BATCH, RATE, TRIED = 600, 32, 3e-3, 128
SHARP = 3.0  # of the bell that the wanted function is smoothed with


def cells(samples: int, even: bool) -> tuple[Tensor, Tensor]:
    """Places in the middle of cells that fill the unit interval, and the cells' sizes; uneven ones crowd at 0."""
    edges = torch.arange(samples + 1) / samples
    edges = edges if even else edges**2
    return (edges[1:] + edges[:-1]) / 2, edges.diff()


def drawn(random: torch.Generator, rows: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth functions at places `[b n]`, and the same smoothed by a bell around each place."""
    size = torch.randn(rows, 2 * WAVES + 1, generator=random) / math.sqrt(WAVES)

    def function(at: Tensor) -> Tensor:
        angles = math.pi * at * torch.arange(1, WAVES + 1)[:, None]
        return size @ torch.cat([torch.ones_like(at)[None], angles.sin(), angles.cos()])

    fine, _ = cells(FINE, even=True)
    bells = (SHARP * (2 * math.pi * (places[:, None] - fine)).cos()).softmax(-1)
    return function(places), function(fine) @ bells.T


class _Operator(nn.Module):
    """One layer of attention between two small nets, which are told a sample's value and its place."""

    def __init__(self, method: Method | None = None) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.attention = Attention(WIDTH, 2, method, batch_first=True)
        self.last = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))

    def forward(self, values: Tensor, places: Tensor) -> Tensor:
        turn = 2 * math.pi * places.expand_as(values)
        x = self.first(torch.stack([values, turn.sin(), turn.cos()], -1))
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])[..., 0]


def trained(seed: int) -> _Operator:
    torch.manual_seed(seed)
    model, random, (places, _) = _Operator(), torch.Generator().manual_seed(seed), cells(SAMPLES, even=True)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        values, wanted = drawn(random, BATCH, places)
        optimiser.zero_grad()
        (model(values, places) - wanted).square().mean().backward()
        optimiser.step()
        rates.step()
    return model


@torch.no_grad()
def error(model: _Operator, method: Method | None, places: Tensor, seed: int) -> float:
    """Root of the mean square error on fresh functions, over that of guessing the mean."""
    same = _Operator(method)
    same.load_state_dict(model.state_dict())
    values, wanted = drawn(torch.Generator().manual_seed(10_000 + seed), TRIED, places)
    off, guess = (float((wanted - x).square().mean().sqrt()) for x in (same(values, places), wanted.mean()))
    return off / guess


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model = trained(seed)
    found = {f"error, {n} even samples": error(model, None, cells(n, True)[0], seed) for n in (SAMPLES, 4 * SAMPLES)}
    for n in (SAMPLES, 4 * SAMPLES):
        places, sizes = cells(n, even=False)
        other = sizes[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
        for name, weights in (("by quadrature", sizes), ("by shuffled quadrature", other)):
            method = ContinuumAttention(tuple(weights.tolist()))
            found[f"error, {n} uneven samples {name}"] = error(model, method, places, seed)
        found[f"error, {n} uneven samples alike"] = error(model, None, places, seed)
    alike, shuffled, ours = (
        found[f"error, {SAMPLES} uneven samples {how}"] for how in ("alike", "by shuffled quadrature", "by quadrature")
    )
    return min(alike, shuffled) - ours, found


CLAIM = Claim(
    key="P048",
    method="ContinuumAttention",
    says="Attention approximates an integral, so that what was learned on one grid serves others, if each sample "
    "counts by its weight in a quadrature.",
    paper_number="none given for uneven grids; errors level over resolutions, in figures",
    setup=f"A net with one layer of attention learns, on {SAMPLES} even samples, to smooth functions on the unit "
    f"interval, {STEPS} steps of {BATCH}; tried on fresh ones, at {SAMPLES} and {4 * SAMPLES} samples, even and "
    "crowded at one end: with all samples alike, by the sizes of their cells, and by sizes of others.",
    effect=f"error on {SAMPLES} uneven samples over a guess's, the lower of alike and shuffled, less by quadrature",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
