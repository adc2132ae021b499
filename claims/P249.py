"""Radial attention: where attention thins out with time and space, is its mask nearer to the whole than others?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from claims.ledger import Claim, run
from heedful.conformance.bare import Bare, Shape
from heedful.core.regions import Region
from heedful.methods import RadialAttention

FRAMES, ROWS, COLS = 24, 8, 8
SIZE = ROWS * COLS
BLOCK = 8


def _kept() -> Tensor:
    n = FRAMES * SIZE
    call = Bare(Shape(q=n, k=n, b=1, h=1, g=1), rules=()).call
    call = replace(call, roles={"patches": Region(((0, n),), (FRAMES, ROWS, COLS))})
    return RadialAttention(BLOCK).narrow(call.mask, call).keeps(call.pairs)[0, 0]


def _most(priority: Tensor, counts: Tensor) -> Tensor:
    """Of each row so many keys, those of the highest priority."""
    place = priority.argsort(-1, descending=True).argsort(-1)
    return place < counts[:, None]


def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw = torch.Generator().manual_seed(seed)
    n = FRAMES * SIZE
    time, place = torch.arange(n) // SIZE, torch.arange(n) % SIZE
    apart = (time[:, None] - time).abs().double()
    aside = (place[:, None] - place).abs().double()
    in_time, in_space = (0.05 + 0.45 * torch.rand(2, generator=draw, dtype=torch.float64)).tolist()
    scores = torch.randn(n, n, generator=draw, dtype=torch.float64) - in_time * apart - in_space * aside
    values = torch.randn(n, 32, generator=draw, dtype=torch.float64)
    noise = torch.rand(n, n, generator=draw, dtype=torch.float64)
    radial = _kept()
    counts = radial.sum(-1)
    masks = {
        "radial": radial,
        "nearest frames": _most(-apart + noise / 2, counts),
        "nearest places": _most(-aside + noise / 2, counts),
        "drawn": _most(noise, counts),
    }
    whole = scores.softmax(-1) @ values
    errors = {
        name: float(((scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values) - whole).norm() / whole.norm())
        for name, mask in masks.items()
    }
    other = min(error for name, error in errors.items() if name != "radial")
    numbers = {f"error, {name}": error for name, error in errors.items()}
    numbers |= {"share of pairs": float(radial.double().mean()), "decay in time": in_time, "in space": in_space}
    return 100 * (1 - errors["radial"] / other), numbers


CLAIM = Claim(
    key="P249",
    method="RadialAttention",
    says="Where attention falls off with distance in time and space, a mask that thins out with both loses least.",
    paper_number="1.9 times as fast on HunyuanVideo at its length, with pictures of like quality",
    setup=f"No video model is at hand: scores that fall off by drawn rates with frames and with places in the frame, "
    f"as the paper finds them, and noise; {FRAMES} frames of {SIZE} tokens, blocks of {BLOCK}. Against masks with as "
    "many keys for each query: the nearest frames, the nearest places, and keys drawn at random; whichever comes "
    "nearest to whole attention. It tells what the mask does to such attention, and nothing of time or pictures.",
    effect="error below that of the best other mask, %",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
