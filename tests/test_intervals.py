"""Intervals that hold however often one looks: the shares of false verdicts under the null, and the formulas."""

from __future__ import annotations

import math
import random

import pytest
import torch

from heedful.bench.intervals import BETS, LEAST, PRIOR, Gap
from heedful.bench.results import MARGIN

LOOKS = (30, 40, 50, 60, 80, 100, 130, 170, 220, 290)  # where `compare` looks


def words(differences: list[float], risk: float, most: float) -> set[str]:
    """What any look says."""
    return {Gap.of(differences[:n], risk, most).says(True, MARGIN) for n in LOOKS}


def bounded(draw: random.Random, mean: float) -> list[float]:
    """Differences of answers that are right or wrong: losses in a tenth of the prompts, and wins to give the mean."""
    return [(x < 0.1 + max(mean, 0)) - (x > 0.9 + min(mean, 0)) for x in (draw.random() for _ in range(LOOKS[-1]))]


def test_three_rows_that_do_not_differ_are_seldom_called_so_at_any_look() -> None:
    draw, runs, false = random.Random(0), 200, 0
    for _ in range(runs):  # ten looks at three rows, each of which may be called better or worse by chance
        false += any({"better", "worse"} & words(bounded(draw, 0), 0.05 / 3, 1.0) for _ in range(3))
    assert false / runs <= 0.05


def test_a_row_that_is_worse_by_the_margin_is_seldom_called_safe() -> None:
    """None lost among thirty is nothing: it happens to one row in five that loses a prompt in twenty."""
    draw, runs, false = random.Random(1), 400, 0
    for _ in range(runs):
        lost = [-float(draw.random() < MARGIN) for _ in range(LOOKS[-1])]
        false += bool({"better", "safe"} & words(lost, 0.05, 1.0))
    assert false / runs <= 0.05


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_means_of_texts_are_seldom_called_different(kind: str) -> None:
    draw, runs, false = torch.Generator().manual_seed(2), 800, 0
    for _ in range(runs):
        x = torch.randn(LOOKS[-1], 5, generator=draw, dtype=torch.float64)
        y = x[:, 0] if kind == "normal" else x[:, 0] / x[:, 1:].square().mean(1).sqrt()  # Student's t of four degrees
        false += bool({"better", "worse"} & words(y.tolist(), 0.05, math.inf))
    assert false / runs <= 0.05


def test_every_difference_is_decided_in_the_end() -> None:
    draw = random.Random(3)
    for mean, word in ((0.3, "better"), (-0.3, "worse")):
        assert Gap.of(bounded(draw, mean), 0.05 / 10, 1.0).says(True, MARGIN) == word
    same = [0.0] * LOOKS[-1]
    assert Gap.of(same[:60], 0.05 / 10, 1.0).says(True, MARGIN) == ""
    assert Gap.of(same, 0.05 / 10, 1.0).says(True, MARGIN) == "safe"


def test_the_interval_of_betting_is_where_no_capital_has_grown() -> None:
    draw = random.Random(4)
    x = [draw.choice((-1.0, 0.0, 0.0, 1.0)) for _ in range(50)]
    gap = Gap.of(x, 0.1, 1.0)

    def capital(mean: float, up: int) -> float:
        """The mean of the capitals of those who bet a fixed share that the mean is higher, or lower, than said."""
        total = 0.0
        for bet in BETS.tolist():
            won = 1.0
            for d in x:
                share, said = ((1 + up * v) / 2 for v in (d, mean))
                won *= 1 + bet * (share - said) / said
            total += won
        return total / len(BETS)

    for end, up in ((gap.low, 1), (gap.high, -1)):
        assert capital(end, up) == pytest.approx(1 / 0.05, rel=1e-4)
        assert capital(end + up * 0.02, up) < 1 / 0.05 < capital(end - up * 0.02, up)
    mirrored = Gap.of([-v for v in x], 0.1, 1.0)
    assert (-mirrored.high, -mirrored.low) == pytest.approx((gap.low, gap.high))


def test_the_t_interval_is_where_the_likelihood_ratio_is_small() -> None:
    x = [0.3, -0.1, 0.4, 0.2, 0.0, 0.5, 0.1, 0.2]
    gap = Gap.of(x, 0.05)

    def ratio(mean: float) -> float:
        """Of normal effects spread by 1 / sqrt(PRIOR) around this mean, over that mean, the scale averaged out."""
        moved = [v - mean for v in x]
        squares, total, n = sum(v * v for v in moved), sum(moved), len(x)
        return math.sqrt(PRIOR / (n + PRIOR)) * (squares / (squares - total * total / (n + PRIOR))) ** (n / 2)

    assert ratio(gap.low) == pytest.approx(20)
    assert ratio(gap.high) == pytest.approx(20)
    assert Gap.of(x[:2], 0.05).low == -math.inf
    assert Gap.of(x[:2], 0.05).high == math.inf


def test_what_a_gap_says() -> None:
    def says(mean: float, low: float, high: float, up: bool = True, prompts: int = LEAST) -> str:
        return Gap(mean, low, high, prompts).says(up, 0.05)

    assert says(0.2, 0.1, 0.3) == "better"
    assert says(0.2, 0.1, 0.3, up=False) == "worse"
    assert says(0.2, 0.1, 0.3, prompts=LEAST - 1) == ""
    assert says(0.0, -0.04, 0.3) == says(-0.02, -0.04, -0.01) == "safe"
    assert says(-0.04, -0.07, -0.01) == ""  # surely worse, and may yet prove worse by little
    assert says(-0.06, -0.09, -0.01) == says(0.06, 0.01, 0.09, up=False) == "worse"
    assert says(-0.06, -0.09, 0.01) == ""


def test_the_mean_of_tasks_lies_in_the_mean_of_their_intervals() -> None:
    assert Gap.mean_of([Gap(0.0, -1.0, 1.0, 40), Gap(2.0, 1.0, 3.0, 30)]) == Gap(1.0, 0.0, 2.0, 30)
    assert not Gap(1.0, 0.5, 1.5, 29).sure
    assert Gap(1.0, 0.5, 1.5, 30).sure
