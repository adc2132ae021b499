"""Positional attention: does what was learned on small numbers hold on large ones, if places alone tell who looks?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from claims.ledger import Claim, run
from heedful import Method
from heedful.methods import PositionalAttention
from heedful.nn import Attention

NUMBERS, WIDTH, LAYERS, HEADS = 8, 32, 3, 2  # log2(8) layers
STEPS, BATCH, RATE, TRIED = 1000, 64, 2e-3, 256
SMALL, LARGE = 2.0, 20.0  # numbers are drawn up to these, to both sides


class _Net(nn.Module):
    """Layers of attention and feed-forward parts on a row of numbers; the tokens hold their places too, if told."""

    def __init__(self, method: Method | None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 1)
        self.place = nn.Parameter(torch.randn(NUMBERS, WIDTH) * 0.1) if method is None else None
        self.attention = nn.ModuleList(
            Attention(WIDTH, HEADS, method, batch_first=True, layer=i, depth=LAYERS) for i in range(LAYERS)
        )
        self.forth = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x[..., None])
        x = x if self.place is None else x + self.place
        for attention, forth in zip(self.attention, self.forth, strict=True):
            x = x + attention(x, x, x, need_weights=False)[0]
            x = x + forth(x)
        return self.last(x)[..., 0]


def _asked(random: torch.Generator, rows: int, most: float, least: bool) -> tuple[Tensor, Tensor]:
    """Numbers, and their sums so far or the least of them so far."""
    x = (torch.rand(rows, NUMBERS, generator=random) * 2 - 1) * most
    return x, x.cummin(1).values if least else x.cumsum(1)


def error(method: Method | None, least: bool, seed: int) -> tuple[float, float]:
    """The error over that of guessing the mean, roots of mean squares: on numbers as in training, and larger ones."""
    torch.manual_seed(seed)
    net, random = _Net(method), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        x, wanted = _asked(random, BATCH, SMALL, least)
        optimiser.zero_grad()
        (net(x) - wanted).square().mean().backward()
        optimiser.step()
        rates.step()
    found = []
    with torch.no_grad():
        for most in (SMALL, LARGE):
            x, wanted = _asked(torch.Generator().manual_seed(10_000 + seed), TRIED, most, least)
            off, guess = (float((wanted - y).square().mean().sqrt()) for y in (net(x), wanted.mean(0)))
            found.append(off / guess)
    return found[0], found[1]


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers, gaps = {}, []
    for task, least in (("sum", False), ("least", True)):
        for name, method in (("softmax", None), ("positional", PositionalAttention())):
            within, beyond = error(method, least, seed)
            numbers |= {f"{task}, {name}": within, f"{task} of larger, {name}": beyond}
        gaps.append(numbers[f"{task} of larger, softmax"] - numbers[f"{task} of larger, positional"])
    return sum(gaps) / 2, numbers


CLAIM = Claim(
    key="P059",
    method="PositionalAttention",
    says="Where an algorithm tells by places alone who looks at whom, attention by places alone does better on numbers "
    "larger than any in training.",
    paper_number="figures alone; out-of-distribution loss below a standard transformer's on sums, minima and others",
    setup=f"{NUMBERS} numbers up to {SMALL:g}; sums so far, and the least so far. {LAYERS} layers of {HEADS} heads, "
    f"{WIDTH} wide, without norms, {STEPS} steps of {BATCH} rows, with positional attention, and with softmax "
    f"attention whose tokens hold learned places; tried on numbers up to {LARGE:g}.",
    effect="error of softmax attention less that of positional attention on larger numbers, as shares of a guess's",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
