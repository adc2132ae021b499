"""Whether a look falls into a box: where it is highest, and how much of it."""

from __future__ import annotations

import math

from torch import Tensor

LEAST = 1e-6  # of a look, or of a box: less is as good as none


def stand_for(parts: Tensor) -> Tensor:
    """Which tokens stand for a box, by how much of each one's patch lies in it: half as much as of any other's."""
    most = parts.max()
    return (most > LEAST) & (2 * parts >= most)


def peaks(looks: Tensor, inside: Tensor) -> float:
    """1 where the highest look is at a token inside, else 0."""
    return float(inside[int(looks.argmax())] and looks.any())


def log_share(looks: Tensor, inside: Tensor) -> float:
    """How much of the look falls inside, as a log-probability."""
    share = looks[inside].sum() / looks.sum().clamp(min=LEAST)
    return math.log(max(float(share), LEAST))
