"""Intervals over a few seeds miss as often as they say."""

import pytest
import torch

from heedful.laboratory.course import Quantity
from heedful.laboratory.describing import written
from heedful.laboratory.differences import Difference, student


@pytest.mark.parametrize("seeds", [3, 5, 8, 20])
def test_intervals_hold_what_they_promise(seeds: int) -> None:
    draw = torch.Generator().manual_seed(seeds)
    found = [Difference.of(torch.randn(seeds, generator=draw, dtype=torch.float64).tolist()) for _ in range(1000)]
    assert 0.03 < sum(x.low > 0 or x.high < 0 for x in found) / 1000 < 0.07


def test_few_seeds_are_never_sure() -> None:
    assert not Difference.of([1.0, 1.1, 0.9]).sure
    assert Difference.of([1.0 + i / 100 for i in range(8)]).sure
    assert not Difference.of([(-1.0) ** i for i in range(8)]).sure


def test_quantiles_join_where_the_table_ends() -> None:
    assert student(2) == 12.71
    assert student(11) == pytest.approx(2.228, abs=3e-3)
    assert student(1000) == pytest.approx(1.962, abs=1e-3)
    assert [student(n) for n in range(2, 40)] == sorted((student(n) for n in range(2, 40)), reverse=True)


def test_a_number_that_rounds_to_zero_has_no_sign() -> None:
    what = Quantity("8-bit", "", "nats")
    assert [written(x, what) for x in (-0.0002, 0.0002, -0.5, -12.3456)] == ["0.000", "0.000", "-0.500", "-12.35"]
