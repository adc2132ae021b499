"""Scores of a tile by a small net, and what a model adds to them, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, within_budget
from heedful.core.errors import SiteError
from heedful.kit import tile_scores
from heedful.kit.tile_scores import additive, biased, operands
from heedful.methods import NeuralAttention

ROWS, COLS = slice(5, 9), slice(2, 11)


def test_a_small_net_for_every_pair() -> None:
    draw = torch.Generator().manual_seed(1)
    q, k, of_query, of_key, out = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((2, 3, 4, 5), (2, 3, 6, 5), (7, 5), (7, 5), (1, 7))
    )
    found = additive(q, k, of_query, of_key, out)
    assert found.shape == (2, 3, 4, 6)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 2, 4), (1, 0, 1, 3)]:
        of_units = zip(out[0].tolist(), of_query @ q[b, h, i] + of_key @ k[b, h, j], strict=True)
        assert close(found[b, h, i, j], torch.tensor(sum(v * math.tanh(x) for v, x in of_units), dtype=torch.float64))


def given() -> tuple[Tensor, ...]:
    """Queries, keys, and the net's three parts."""
    draw = torch.Generator().manual_seed(3)
    shapes = ((2, 3, 4, 5), (2, 3, 6, 5), (7, 5), (7, 5), (1, 7))
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes)


def by_units(q: Tensor, k: Tensor, of_query: Tensor, of_key: Tensor, out: Tensor) -> Tensor:
    units = zip(out[0], of_query, of_key, strict=True)
    return sum(v * torch.tanh((q @ a)[..., None] + (k @ b)[..., None, :]) for v, a, b in units)  # type: ignore[return-value]


@pytest.mark.parametrize("size", [1, 13, 50, 1 << 17])  # a row at a time, two, a head or two, and all
def test_pieces_and_their_way_back(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_scores, "PIECE", size)
    monkeypatch.setattr(tile_scores, "LEAST", 1)
    draw = torch.Generator().manual_seed(4)
    weight = torch.randn(2, 3, 4, 6, generator=draw, dtype=torch.float64)
    found, wanted = additive(*given()), by_units(*given())
    assert close(found, wanted)
    leaves = [given(), given()]
    for i, way in enumerate((additive, by_units)):
        (way(*leaves[i]) * weight).sum().backward()
    for one, other in zip(*leaves, strict=True):
        assert other.grad is not None
        assert bool(other.grad.any())
        assert close(one.grad, other.grad)


@pytest.mark.parametrize(
    ("size", "rows", "maps", "step"), [(160, 5, 3, 16), (399, 40, 1, 39), (400, 40, 1, 40), (20, 40, 1, 16)]
)
def test_some_whole_maps_or_some_rows_of_one(
    size: int, rows: int, maps: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_scores, "PIECE", size)
    found = [here for here, _ in tile_scores._pieces(torch.zeros(1, 7, rows, 1), torch.zeros(1, 7, 10, 1))]
    assert found == [(slice(h, h + maps), slice(i, i + step)) for h in range(0, 7, maps) for i in range(0, rows, step)]


@pytest.mark.parametrize("far", [50.0, 200.0, 1000.0])  # exponentials of twice the last are no numbers
def test_units_far_apart_come_near_one_another_in_the_sum(far: float) -> None:
    q = torch.tensor([far, far, -far, 0.0], dtype=torch.float64).view(1, 1, 4, 1).requires_grad_()
    k = torch.tensor([0.5 - far, far, 0.0], dtype=torch.float64).view(1, 1, 3, 1)
    one = torch.ones(1, 1, dtype=torch.float64)
    found = additive(q, k, one, one, one)
    near = math.tanh(0.5)
    wanted = [[near, 1.0, 1.0], [near, 1.0, 1.0], [-1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]
    assert close(found[0, 0], torch.tensor(wanted, dtype=torch.float64))
    (slope,) = torch.autograd.grad(found.sum(), q)
    assert close(slope.flatten(), torch.tensor([1 - near**2, 1 - near**2, 1.0, 1.0], dtype=torch.float64))


def test_the_slope_of_a_unit_whose_exponential_has_few_digits_left_beside_one_near_the_largest() -> None:
    def slope(how: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        q, k = (torch.tensor(x).to(dtype).view(1, 1, 1, 1) for x in (-51.437, 44.3))
        return torch.autograd.grad(how(q.requires_grad_(), k).sum(), q)[0]

    one, plain = torch.ones(1, 1), lambda q, k: (q + k).tanh()
    found = slope(lambda q, k: additive(q, k, one, one, one), torch.float32)
    assert within_budget(found, slope(plain, torch.float32), slope(plain, torch.float64))


# torch scripts its own rules when a derivative is first carried forward
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_it_is_derived_again_and_carried_forward_and_serves_many_inputs() -> None:
    assert torch.autograd.gradgradcheck(additive, given())
    leaves = given()
    slopes = (torch.autograd.grad(f(*leaves).square().sum(), leaves, create_graph=True) for f in (additive, by_units))
    for one, other in zip(*slopes, strict=True):
        assert close(one, other)
    q, *rest = (x.detach() for x in given())
    way = torch.randn(q.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for mine, wanted in zip(*(jvp(partial(_first, f, rest), (q,), (way,)) for f in (additive, by_units)), strict=True):
        assert close(mine, wanted)
    many = vmap(lambda x: additive(x, *rest))(torch.stack([q, way]))
    assert close(many[1], by_units(way, *rest))


def _first(f: Callable[..., Tensor], rest: list[Tensor], x: Tensor) -> Tensor:
    return f(x, *rest)


def test_weights_decide_in_which_precision() -> None:
    x, weight = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16), torch.ones(3, 4)
    assert additive(x, x, weight, weight, torch.ones(1, 3)).dtype == torch.float32


def test_operands_are_the_tile_s() -> None:
    bare = Bare()
    call = replace(bare.call, query=bare.q, key=bare.k).tile(ROWS, COLS)
    query, key = operands(NeuralAttention(), call)
    assert torch.equal(query, bare.q[:, :, 5:9])
    assert torch.equal(key, bare.k[:, :, 2:11])
    for missing in ("query", "key"):
        with pytest.raises(
            SiteError, match=r"NeuralAttention\(width=2\), layer 0: scores are those of a tile, from SCORES on"
        ):
            operands(NeuralAttention(), replace(call, **{missing: None}))


@pytest.mark.parametrize("rows", [1, 19])
def test_a_bias_is_added_where_it_belongs(rows: int) -> None:
    draw = torch.Generator().manual_seed(2)
    bias, scores = torch.randn(2, 4, rows, 19, generator=draw), torch.randn(2, 4, 4, 9, generator=draw)
    call = Bare().call.tile(ROWS, COLS)
    assert biased(scores, call) is scores
    found = biased(scores.double(), replace(call, bias=bias))
    assert found.dtype == torch.float64
    for b, h, i, j in [(0, 0, 0, 0), (1, 3, 3, 8), (0, 2, 1, 7), (1, 1, 2, 3)]:
        added = scores[b, h, i, j].double() + bias[b, h, i + 5 if rows > 1 else 0, j + 2]
        assert close(found[b, h, i, j], added)
