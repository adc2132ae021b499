"""Ranges of a setting, as in `SnapKV(budget=0.1..0.75)`: a few values from end to end."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import product

from heedful.core.errors import FieldError

STEPS = 4  # values of a range
NUMBER = r"\d+(?:\.\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})?")


def ranged(text: str, most: int | None = None) -> list[str]:
    """The text once for each value of the ranges in its settings.

    A range is four values, each the same factor above the one before. One without an end, as in `needle(length=512..)`,
    doubles its value up to `most`, which is what a model takes.
    """
    name, opened, settings = text.partition("(")
    parts = RANGE.split(settings)
    values = [_values(a, b, most, text) for a, b in zip(parts[1::3], parts[2::3], strict=True)]
    return [
        name + opened + "".join(x for pair in zip(parts[::3], (*chosen, ""), strict=True) for x in pair)
        for chosen in product(*values)
    ]


def _values(first: str, last: str | None, most: int | None, text: str) -> Sequence[str]:
    low, high = float(first), float("nan") if last is None else float(last)
    written = f"{first}..{last or ''}"

    def refused(rule: str, good: str) -> FieldError:
        option = "--methods" if most is None else "--tasks"
        return FieldError("compare", option, text, f"the range {written} {rule}", text.replace(written, good, 1))

    if low <= 0:
        raise refused("must begin above 0", "0.1..0.75")
    if last is None:
        if most is None:
            raise refused("needs an end", f"{first}..{4 * low:g}")
        if low > most:
            raise refused(f"begins above {most}, which is what the model takes at most", f"{most // 2}..")
        return [f"{low * 2**i:g}" for i in range(1 + int(math.log2(most / low)))]
    if low >= high:
        raise refused("must end above where it begins", f"{last}..{2 * low:g}" if low == high else f"{last}..{first}")
    found = [low * (high / low) ** (i / (STEPS - 1)) for i in range(STEPS)]
    whole = "." not in first + last
    inner = [f"{round(x)}" if whole else f"{float(f'{x:.2g}'):g}" for x in found[1:-1]]
    return list(dict.fromkeys([first, *inner, last]))
