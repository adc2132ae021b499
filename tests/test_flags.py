"""Flags as bytes: the same as torch's booleans, whatever stands where nobody may look."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch
from torch.func import vmap

from heedful.core import flags
from heedful.core.flags import CHUNK

LEAST = torch.finfo(torch.float32).min


def drawn(*shape: int, share: float = 0.3) -> torch.Tensor:
    return torch.rand(*shape) < share


@pytest.mark.parametrize("shape", [(5, 7), (1, 3), (0, 4), (4, 0)])
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_reductions_are_those_of_booleans(shape: tuple[int, ...], dim: int, share: float) -> None:
    x = drawn(*shape, share=share)
    assert torch.equal(flags.some(x, dim), x.any(dim))
    assert torch.equal(flags.every(x, dim), x.all(dim))


def test_joins_and_comparisons_are_those_of_booleans() -> None:
    a, b = drawn(2, 1, 5, 1), drawn(1, 3, 1, 7)
    assert torch.equal(flags.both(a, b), a & b)
    assert torch.equal(flags.either(a, b), a | b)
    assert flags.numbers(a, torch.ones(1, dtype=torch.float64)).tolist() == a.double().tolist()
    for kind in (flags.whole(20), flags.whole(1 << 15), torch.float32):
        x, start, stop = (torch.randint(-20, 20, shape).to(kind) for shape in ((1, 30), (9, 1), (9, 1)))
        assert torch.equal(flags.between(x, start, stop), (x >= start) & (x < stop))
        assert torch.equal(flags.at_least(x, start), x >= start)
        assert torch.equal(flags.same(x, start), x == start)
    x, y = torch.randint(0, 8, (1, 30), dtype=torch.int32), torch.randint(0, 8, (9, 1), dtype=torch.int32)
    for kind in (torch.int32, torch.int16, torch.uint8):
        one, other = (x.to(kind), y.to(kind)), (x.to(kind).flip(-1), y.to(kind).flip(0))
        assert torch.equal(flags.meets(one), (x & y) != 0)
        assert torch.equal(flags.meets(one, other), ((x & y) | (x.flip(-1) & y.flip(0))) != 0)
        assert torch.equal(flags.apart(one, other), ~flags.meets(one, other))
    assert (flags.whole((1 << 15) - 1), flags.whole(1 << 15)) == (torch.int16, torch.int32)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(("about", "spread"), [(40, 0), (30, 0), (30, 1), (30, 3), (30, 25)])
def test_what_all_rows_agree_on_is_not_asked_of_each(
    about: int, spread: int, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.stack([torch.arange(40) if alike else torch.randperm(40) for _ in range(6)]).view(2, 3, 1, 40).short()
    limit = about + torch.randint(-spread, spread + 1, (2, 3, 9, 1)).short()
    monkeypatch.setattr(flags, "at_least", asked := Mock(wraps=flags.at_least))
    assert torch.equal(flags.reaches(x, limit), x <= limit)
    columns = [call.args[1].shape[-1] for call in asked.call_args_list]
    unsure = (x > limit.amin(-2, keepdim=True)).flatten(0, -2).any(0).nonzero()
    near = int(unsure[-1] - unsure[0]) + 1 if len(unsure) else 0
    assert near < 20 or not alike or spread == 25
    assert columns == [40, *([near if near <= 20 else 40] if near else [])]  # one row for all, and then each


def test_they_take_many_inputs_at_once() -> None:
    x, start = torch.randint(0, 9, (4, 6)), torch.tensor(4)
    found = vmap(lambda row: flags.either(flags.same(row, start), flags.between(row, start, start + 2)))(x)
    assert torch.equal(found, (x == 4) | ((x >= 4) & (x < 6)))
    assert torch.equal(vmap(lambda row: flags.some(row > 7, -1))(x), (x > 7).any(-1))
    limit = torch.tensor([[2], [5]])
    assert torch.equal(vmap(lambda row: flags.reaches(row, limit))(x), x[:, None] <= limit)


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf, 2e38], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_what_is_hidden_has_the_same_number_whatever_stood_there(bad: float, heads: int, into: bool) -> None:
    keep = drawn(1, heads, 4, CHUNK // 4)  # more than one part of rows
    keep[..., 0] = False
    x = torch.randn(2, 3, 4, CHUNK // 4)
    x[..., 0] = bad
    before = x.clone()
    for found, other in (
        (flags.lowered(x if not into else x.clone(), keep, into=into, cut=False), LEAST),
        (flags.zeroed(x if not into else x.clone(), keep, into=into), 0.0),
    ):
        assert torch.equal(found, before.masked_fill(~keep, other))
        assert torch.equal(x.nan_to_num(), before.nan_to_num())


def test_both_are_made_in_place_where_they_may_be() -> None:
    keep = drawn(1, 1, 5, 6)
    for act in (lambda x: flags.lowered(x, keep, into=True, cut=False), lambda x: flags.zeroed(x, keep, into=True)):
        x = torch.randn(1, 1, 5, 6)
        assert act(x) is x
    for cut in (False, True):  # who hands over a view does not look at what comes back
        x = torch.randn(1, 1, 5, 6, requires_grad=True) * 1
        assert flags.lowered(x, keep, into=True, cut=cut) is x


@pytest.mark.parametrize("into", [False, True])
def test_gradients_come_back_through_what_is_kept_and_are_cut_off_elsewhere(into: bool) -> None:
    keep, x = drawn(1, 1, 5, 6), torch.randn(1, 2, 5, 6, requires_grad=True)
    told = torch.randn(1, 2, 5, 6)
    (found,) = torch.autograd.grad(flags.lowered(x * 1, keep, into=into, cut=True), x, told)
    assert torch.equal(found, told * keep)
    (found,) = torch.autograd.grad(flags.zeroed(x * 1, keep, into=into), x, told)
    assert torch.equal(found, told * keep)
    (found,) = torch.autograd.grad(flags.lowered(x * 1, keep, into=into, cut=False), x, told)
    assert torch.equal(found, told)
    assert torch.equal(torch.autograd.grad(flags.zeroed(x * keep, keep, into=into), x, told)[0], told * keep)
    keep[..., 0] = True
    plain = torch.autograd.grad(x.masked_fill(~keep, LEAST).softmax(-1), x, told)[0]
    (found,) = torch.autograd.grad(flags.lowered(x * 1, keep, into=into, cut=False).softmax(-1), x, told)
    assert torch.equal(found, plain)


def test_columns_that_all_rows_keep_are_not_touched() -> None:
    keep, x = torch.ones(1, 1, 5, 9, dtype=torch.bool), torch.randn(1, 2, 5, 9)
    assert flags.left_out(keep, x) is None
    assert flags.zeroed(x, keep) is x
    assert flags.lowered(x, keep) is x
    keep[..., 1, 3] = keep[..., 2, 6] = False
    assert flags.left_out(keep, x) == slice(3, 7)
    assert flags.left_out(keep.expand(1, 2, 5, 9), x) == slice(3, 7)
    for act, other in ((flags.zeroed, 0.0), (flags.lowered, LEAST)):
        assert torch.equal(act(x, keep), x.masked_fill(~keep, other))
        assert torch.equal(act(x, keep[..., :1, :]), x)  # flags of one row for all
    rows = torch.arange(5)[:, None] != 2  # flags of whole rows
    assert flags.left_out(rows, x) == slice(0, 9)
    assert torch.equal(flags.zeroed(x, rows[None, None]), x * rows)
    clean = x * keep
    assert flags.zeroed(clean, keep) is clean


def test_what_comes_back_may_be_derived_again() -> None:
    keep, x = drawn(1, 1, 3, 4), torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: flags.zeroed(x * x, keep) ** 2, x)
