"""Statistics: the algebra, on drawn data, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heedful.conformance.tolerances import MERGE, error
from heedful.core.errors import StatisticError
from heedful.core.fitted import compact
from heedful.core.stats import FEW, Cat, Histogram, Max, Mean, Moments, Statistic, Sum, TopK, load, merged, save
from heedful.core.summary import _below, _diagonals

Maker = Callable[[Tensor, int], Statistic]

MAKERS: dict[str, Maker] = {
    "Sum": lambda x, _: Sum.of(x.sum(0)),
    "Mean": lambda x, _: Mean.of(x.sum(0), float(len(x))),
    "Moments": lambda x, _: Moments.of(x),
    "Max": lambda x, n: Max.of(x.T, torch.arange(len(x)) + 100 * n),
    "Histogram": lambda x, _: Histogram.of(x.T, (-2.0, -0.5, 0.0, 1.0, 3.0)),
    "TopK": lambda x, n: TopK.of(x.T, 3, torch.arange(len(x)) + 100 * n),
    "Cat": lambda x, n: Cat.of(f"{n}", x),
}

values = st.integers(-4, 4).map(lambda i: i / 2)
tables = st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=6).map(
    lambda rows: torch.tensor(rows, dtype=torch.float32)
)


def same(a: Statistic, b: Statistic) -> bool:
    return set(a.tensors()) == set(b.tensors()) and all(
        error(x, b.tensors()[name]) <= MERGE * 100 for name, x in a.tensors().items()
    )


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=30)
@given(parts=st.tuples(tables, tables, tables))
def test_merging_is_associative_and_commutative(kind: str, parts: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, c = (MAKERS[kind](x, n) for n, x in enumerate(parts))
    assert same((a + b) + c, a + (b + c))
    assert same(a + b, b + a)


@pytest.mark.parametrize("kind", [k for k in MAKERS if k != "Cat"])
@settings(max_examples=30)
@given(rows=st.lists(st.lists(values, min_size=3, max_size=3), min_size=2, max_size=8), cut=st.integers(1, 7))
def test_a_split_tells_what_the_whole_tells(kind: str, rows: list[list[float]], cut: int) -> None:
    x = torch.tensor(rows)
    cut = min(cut, len(rows) - 1)
    if kind in ("Max", "TopK"):  # their places count from where a part begins
        make = {"Max": Max.of, "TopK": lambda y, p: TopK.of(y, 3, p)}[kind]
        place = torch.arange(len(x))
        assert same(make(x[:cut].T, place[:cut]) + make(x[cut:].T, place[cut:]), make(x.T, place))
    else:
        assert same(MAKERS[kind](x[:cut], 0) + MAKERS[kind](x[cut:], 0), MAKERS[kind](x, 0))


def test_moments_are_those_of_all_samples() -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    found = Moments.of(x[:7]) + Moments.of(x[7:8]) + Moments.of(x[8:])
    assert error(found.value, x.mean(0)) < 1e-12
    assert error(found.variance, x.var(0, unbiased=False)) < 1e-12


def test_unlike_lengths_meet_position_by_position() -> None:
    found = Mean.of(torch.tensor([2.0, 4.0]), 2.0) + Mean.of(torch.tensor([1.0, 1.0, 5.0]), 1.0)
    assert found.value.tolist() == [1.0, 5.0 / 3.0, 5.0]
    assert (Sum(torch.tensor(1.0)) + Sum(torch.tensor(2.0))).total.item() == 3
    high = Max(torch.tensor([-1.0]), torch.tensor([3])) + Max(torch.tensor([-2.0, -7.0]), torch.tensor([1, 9]))
    assert high.high.tolist() == [-1.0, -7.0]
    assert high.place.tolist() == [3, 9]


def test_what_lies_once_in_both_lies_once_in_the_sum() -> None:
    wide = torch.tensor([[1.0], [2.0]], dtype=torch.float64).expand(2, FEW)
    rising = torch.arange(1.0 * FEW, dtype=torch.float64)[None].expand(2, FEW)
    found = Mean(torch.rand(2, FEW), wide) + Mean(torch.rand(2, FEW), wide)
    assert torch.equal(found.count, 2 * wide)
    assert found.count.untyped_storage().nbytes() == 2 * 8  # the counts of many long texts are few
    for one, other in ((wide, rising), (rising, rising), (wide, wide), (rising, rising.contiguous())):
        for a, b in ((one, other), (one, other[:, :-3]), (one[:, :-3], other)):
            assert torch.equal((Sum(a) + Sum(b)).total, (Sum(a.contiguous()) + Sum(b.contiguous())).total)
    assert (Sum(rising) + Sum(rising[:, 3:])).total.untyped_storage().nbytes() == FEW * 8
    none = wide[:, :0].expand(FEW, 2, 0)
    assert (Sum(none) + Sum(none)).total.shape == (FEW, 2, 0)


def test_of_equal_maxima_the_first_place_wins() -> None:
    a, b = Max(torch.tensor([1.0]), torch.tensor([5])), Max(torch.tensor([1.0]), torch.tensor([2]))
    assert (a + b).place.tolist() == (b + a).place.tolist() == [2]
    assert TopK.of(torch.tensor([1.0, 3.0, 3.0]), 2).place.tolist() == [1, 2]


def test_histogram_takes_what_lies_outside_into_its_ends() -> None:
    found = Histogram.of(torch.tensor([-9.0, 0.5, 9.0]), (0.0, 1.0, 2.0), weight=torch.tensor([1.0, 2.0, 3.0]))
    assert found.counts.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("kind", MAKERS)
def test_saving_and_pickling_keep_everything(kind: str, tmp_path: Path) -> None:
    stat = MAKERS[kind](torch.randn(5, 3), 0)
    back = load(save(tmp_path / "s.safetensors", {"a.b": stat}))["a.b"]
    assert type(back) is type(stat)
    assert back.settings() == stat.settings()
    assert same(back, stat)
    assert same(pickle.loads(pickle.dumps(stat)), stat)
    assert not list(tmp_path.glob("*.part"))


def bits(x: Tensor) -> tuple[torch.dtype, list[int], list[int]]:
    return x.dtype, list(x.shape), x.contiguous().flatten().view(torch.uint8).tolist()


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2)
ODD = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -float("inf"), 2.0**53, 0.5, 300.0], dtype=torch.float64)
WHOLE = torch.tensor([-(2**63), -(2**31), -(2**15), -1, 0, 1, 255, 256, 2**15, 2**31, 2**63 - 1])
ROWS = [ODD[i:j].to(kind) for kind in FLOATS for i in range(8) for j in range(i, i + 3)]
ROWS += [WHOLE[i:j] for i in range(11) for j in range(i, i + 3)] + [WHOLE.int(), WHOLE.char(), WHOLE.bool()]
ROWS += [torch.tensor([-0.0, 0.0j])]


def test_a_file_gives_back_every_bit(tmp_path: Path) -> None:
    """Of zeros the sign, of what is no number that it is none, of what is alike in all rows each row, and nothing."""
    given = {
        f"{i}": Cat({"row": x, "rows": x.expand(3, -1), "column": x[:, None].expand(-1, 2)}) for i, x in enumerate(ROWS)
    }
    given["single"] = Cat(
        {str(x): x for x in (torch.tensor(-0.0, dtype=torch.float64), torch.tensor(7), torch.tensor(True))}
    )
    found = load(save(tmp_path / "s", given))
    for name, stat in given.items():
        for piece, x in stat.tensors().items():
            assert bits(found[name].tensors()[piece]) == bits(x), (name, piece)


@pytest.mark.parametrize("wide", [torch.float64, torch.int64])
def test_whole_numbers_take_as_many_bytes_as_they_need(wide: torch.dtype) -> None:
    for low, high, few in (
        (0, 255, torch.uint8), (-1, 255, torch.int16), (0, 256, torch.int16), (-(2**15), 2**15 - 1, torch.int16),
        (0, 2**15, torch.int32), (-(2**15) - 1, 0, torch.int32), (-(2**31), 2**31 - 1, torch.int32),
        (0, 2**31, wide), (-(2**31) - 1, 0, wide),
    ):  # fmt: skip
        assert compact(torch.tensor([low, high], dtype=wide)).dtype is few


def test_what_cannot_merge_says_why() -> None:
    one = Sum.of(torch.ones(3))
    with pytest.raises(StatisticError, match="cannot merge Sum with Mean: kinds must agree"):
        one + Mean.of(torch.ones(3), 1.0)  # type: ignore[operator]
    with pytest.raises(StatisticError, match=r"TopK of settings \{'k': 2\} with \{'k': 3\}"):
        TopK.of(torch.ones(4), 2) + TopK.of(torch.ones(4), 3)
    with pytest.raises(StatisticError, match=r"Sum.total of shape \(2, 3\) with \(4, 3\)"):
        Sum.of(torch.ones(2, 3)) + Sum.of(torch.ones(4, 3))
    with pytest.raises(StatisticError, match="both hold 'x'"):
        Cat.of("x", torch.ones(1)) + Cat.of("x", torch.ones(1))
    with pytest.raises(StatisticError, match="nothing to merge"):
        merged([])


def test_files_that_are_not_statistics_say_so(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(StatisticError, match="cannot read statistics from"):
        load(tmp_path / "none.safetensors")
    (tmp_path / "bad").write_text("no")
    with pytest.raises(StatisticError, match="cannot read statistics from"):
        load(tmp_path / "bad")
    save_file({"x": torch.ones(1)}, str(tmp_path / "plain"))
    with pytest.raises(StatisticError, match="holds no heedful statistics"):
        load(tmp_path / "plain")


@pytest.mark.parametrize("r", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 4, 9, 10, 40])
def test_diagonals_add_up(r: int, k: int) -> None:
    x = torch.arange(2.0 * 3 * r * k).view(2, 3, r, k)
    wanted = [x.diagonal(offset, -2, -1).sum(-1) for offset in range(1 - r, k)]
    assert torch.equal(_diagonals(x), torch.stack(wanted, -1))


@pytest.mark.parametrize("r", [1, 2, 5])
@pytest.mark.parametrize("more", [0, 1, 2, 7, 40])
def test_diagonals_below_the_one_that_ends_in_the_corner_add_up(r: int, more: int) -> None:
    k = r + more
    x = torch.arange(2.0 * 3 * r * k).view(2, 3, r, k).tril(k - r)
    wanted = [x.diagonal(offset, -2, -1).sum(-1) for offset in range(1 - r, k - r + 1)]
    assert torch.equal(_below(x), torch.stack(wanted, -1))
