"""Ranges of ranked entries: how many are low, their sum with its gradient, and the n-th, by looking at each."""

from __future__ import annotations

import pytest
import torch

from heedful.conformance.tolerances import close
from heedful.methods.mechanisms.routed._ranked import Ranked


@pytest.mark.parametrize("n", [1, 2, 7, 8, 21])
def test_of_every_range_and_limit(n: int) -> None:
    draw = torch.Generator().manual_seed(n)
    x = torch.randn(2, n, generator=draw).requires_grad_()
    rank = torch.stack([torch.randperm(n, generator=draw) for _ in range(2)])
    ranked = Ranked.of(rank, x)
    every = torch.cartesian_prod(*[torch.arange(n + 1)] * 3)
    every = every[every[:, 0] <= every[:, 1]]
    start, stop, limit = (one.expand(2, -1) for one in every.unbind(-1))
    count, total = ranked.below(start, stop, limit)
    place = torch.arange(n)
    inside = (place >= start[..., None]) & (place < stop[..., None])
    low = inside & (rank[:, None] < limit[..., None])
    assert torch.equal(count, low.sum(-1))
    wanted = torch.where(low, x[:, None].double(), 0.0).sum(-1)
    assert close(total, wanted)
    way = torch.randn(total.shape, generator=draw, dtype=torch.float64)
    assert close(*(torch.autograd.grad((y * way).sum(), x)[0] for y in (total, wanted)))
    found = ranked.nth(start, stop, limit)
    held = limit < stop - start
    in_order = torch.where(inside, rank[:, None], n).sort(-1).values
    nth = in_order.gather(-1, limit.clamp(max=n - 1)[..., None])[..., 0]
    assert torch.equal(found[held], nth[held])


def test_sums_of_many_are_made_in_double_precision() -> None:
    n = 1 << 12
    x = torch.full((1, n), 1e4)
    x[0, -1] = 1e-3
    ends = torch.tensor([[n - 1]]), torch.tensor([[n]]), torch.tensor([[n]])
    assert close(Ranked.of(torch.arange(n)[None], x).below(*ends)[1].float(), torch.tensor([[1e-3]]))
