"""How scores, units and tasks are written."""

from __future__ import annotations

import math
import re

from heedful.bench.results import POINTS, Results
from heedful.core.errors import FieldError
from heedful.core.figures import percent

SIZES = {"B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}
MB = SIZES["MB"]


def number(x: float, unit: str, signed: bool = False) -> str:
    """A score, or a difference of scores, as people write it."""
    if math.isinf(x):
        return "?"  # an end of an interval that few prompts leave open
    if unit in POINTS:
        return f"{rounded(100 * x, 0):+.0f}" if signed else percent(x)
    return f"{rounded(x, 3):+.3f}" if signed else f"{x:.3f}"


def rounded(x: float, digits: int) -> float:
    """Rounded, and no minus before a zero."""
    return round(x, digits) + 0.0


def units(unit: str) -> str:
    return "points" if unit in POINTS else unit


def direction(about: dict[str, object]) -> str:
    return "more" if about["more_is_better"] else "less"


def task_name(c: Results, task: str) -> str:
    """A task's short name, with its settings where two share it."""
    name = str(c.tasks[task]["name"])
    return name if sum(about["name"] == name for about in c.tasks.values()) == 1 else task


def margin(c: Results) -> str:
    """How much worse a safe method may be, in the units of the tasks."""
    kinds = {about["unit"] for about in c.tasks.values()}
    points, others = kinds & set(POINTS), kinds - set(POINTS)
    told = [f"{100 * c.margin:g} points"] * bool(points) + [f"{c.margin:g} nats"] * bool(others)
    return " or ".join(told)


def size(x: float) -> str:
    """Bytes as people write them: `3.1 GB`."""
    unit = max((u for u in SIZES if x >= SIZES[u]), key=lambda u: SIZES[u], default="B")
    return f"{x / SIZES[unit]:.3g} {unit}"


def size_from(text: str | int) -> int:
    """Bytes as people write them, read again; 1 GB is 1024 MB."""
    parts = re.fullmatch(r"([\d_]+(?:\.\d+)?) ?([A-Z]*)", str(text).strip().upper())
    unit = SIZES.get(parts[2].replace("IB", "B") or "B") if parts else None
    if parts is None or unit is None or not float(parts[1]) > 0:
        rule = f"must be a size above 0, in {', '.join(SIZES)}"
        raise FieldError("compare()", "cache", text, rule, "4GB")
    return int(float(parts[1]) * unit)
