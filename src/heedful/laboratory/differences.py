"""A mean difference over a few seeds, with the interval of Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

ENOUGH = 8  # seeds below which no difference is called sure
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # its 97.5 % quantile, for two seeds and more


def student(seeds: int) -> float:
    """The 97.5 % quantile of Student's t for the mean over so many seeds."""
    free = seeds - 1
    return STUDENT[free - 1] if free <= len(STUDENT) else 1.96 + 2.37 / free + 2.82 / free**2


@dataclass(frozen=True)
class Difference:
    """A mean difference to softmax, paired by seed, and its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, differences: Sequence[float]) -> Difference:
        mean, n = statistics.fmean(differences), len(differences)
        half = student(n) * statistics.stdev(differences) / math.sqrt(n)
        return cls(mean, mean - half, mean + half, n)

    @property
    def sure(self) -> bool:
        """The interval lies on one side of zero, and there are seeds enough for it to mean something."""
        return self.seeds >= ENOUGH and (self.low > 0 or self.high < 0)
