"""Intervals for paired differences that hold however often one looks and whenever one stops.

Prompts are added until a verdict is known, so an interval must contain the mean at every number of prompts at once
(a confidence sequence). Where scores have ends it is that of betting (Waudby-Smith and Ramdas 2024, arXiv 2010.09686):
exact, whatever the distribution. Elsewhere it is the anytime-valid t-interval (Wang and Ramdas 2024, arXiv 2310.03722):
exact for normal differences, and close to it for means of texts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SURE = 0.95  # that all intervals of a comparison hold at once
LEAST = 30  # prompts below which nothing is decided
BETS = torch.linspace(0.025, 0.975, 20, dtype=torch.float64)  # shares of the capital that are bet, mixed evenly
PRIOR = 4.0  # the t-interval is narrowest, for its level, at some sixty prompts
PARTS = torch.linspace(0, 1, 17, dtype=torch.float64)[1:-1]  # where the range that holds a bound is cut
CUTS = 6


@dataclass(frozen=True)
class Gap:
    """A mean paired difference to the unedited model, and its interval over prompts."""

    mean: float
    low: float
    high: float
    prompts: int  # of the task with the fewest

    @classmethod
    def of(cls, differences: Sequence[float], risk: float = 1 - SURE, most: float = math.inf) -> Gap:
        """With an interval that misses with probability `risk` at most; no difference lies beyond `most`."""
        x = torch.tensor(differences, dtype=torch.float64)
        if math.isinf(most):
            low, high = student(x, risk)
        else:
            share = (x / most + 1) / 2
            low, high = (most * (2 * end - 1) for end in (_bound(share, risk / 2), 1 - _bound(1 - share, risk / 2)))
        return cls(statistics.fmean(differences), low, high, len(differences))

    @classmethod
    def mean_of(cls, gaps: Iterable[Gap]) -> Gap:
        """The mean of several tasks' differences: its interval holds wherever theirs hold at once."""
        found = list(gaps)
        mean, low, high = (statistics.fmean(getattr(gap, end) for gap in found) for end in ("mean", "low", "high"))
        return cls(mean, low, high, min(gap.prompts for gap in found))

    @property
    def sure(self) -> bool:
        """The interval lies on one side of zero, and there are prompts enough for it to mean something."""
        return self.prompts >= LEAST and (self.low > 0 or self.high < 0)

    def says(self, more_is_better: bool, margin: float) -> str:
        """ "better"; "safe", which is worse by less than the margin; "worse"; or nothing yet.

        Whatever the difference is, one of them comes out in the end. Something surely worse is asked on while its mean
        lies within the margin, since it may prove safe.
        """
        low, mean, high = (self.low, self.mean, self.high) if more_is_better else (-self.high, -self.mean, -self.low)
        if self.prompts < LEAST:
            return ""
        if low > 0:
            return "better"
        if low > -margin:
            return "safe"
        return "worse" if high < 0 and mean <= -margin else ""


def student(x: Tensor, risk: float) -> tuple[float, float]:
    """The mean and what lies so near to it that no bet against it, over normal effects of any size, has won."""
    n, mean = len(x), float(x.mean())
    spread = float((x - mean).square().sum())
    shrunk = PRIOR / (n + PRIOR)
    won = (1 / (risk * math.sqrt(shrunk))) ** (2 / n)
    if won * shrunk >= 1:
        return -math.inf, math.inf
    half = math.sqrt((won - 1) * spread / (n * (1 - won * shrunk)))
    return mean - half, mean + half


def _bound(x: Tensor, risk: float) -> float:
    """The mean of numbers from 0 to 1 that is too low to be true: whoever bet against it has won `1 / risk` fold."""
    values, counts = x.unique(return_counts=True)
    low, high = 0.0, float(x.mean())
    for _ in range(CUTS):
        means = low + (high - low) * PARTS
        won = torch.log1p(BETS[:, None, None] * (values / means[:, None] - 1)) @ counts.double()
        rich = won.logsumexp(0) - math.log(len(BETS)) >= -math.log(risk)  # of the lower means, then of none
        place = int(rich.sum())
        high = float(means[place]) if place < len(means) else high
        low = float(means[place - 1]) if place else low
    return low
