"""docs/gpu.md: which bars hold on which card, or that nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.keeping import Row, read
from benchmarks.gpu.parts import PARTS


@dataclass(frozen=True)
class Bar:
    """A figure of every row of a part must be at most `limit`."""

    text: str
    limit: float
    part: str
    figure: Callable[[Row], float]


def _quarter(name: str) -> Callable[[Row], float]:
    """Time over that of the fastest way through the whole cache."""

    def figure(row: Row) -> float:
        whole = min(float(x["seconds"]) for name, x in row["found"].items() if name.endswith("whole cache"))
        return float(row["found"][name]["seconds"]) / whole

    return figure


def _memory(row: Row) -> float:
    peaks = row.get("peak_mb", {})
    return peaks["default diagnose"] / peaks["plain forward"] if peaks else math.nan


BARS = (
    Bar("default diagnose over a plain forward with flash attention, a random model shaped like 1B, 2k to 128k tokens, "
        "time", 1.15, "diagnose", lambda row: float(row["found"]["default diagnose"]["ratio"])),
    Bar("the same, peak memory", 1.10, "diagnose", _memory),
    Bar("sparse prefill attention over density x dense flash attention, 32k and 128k tokens, time", 1.15, "prefill",
        lambda row: max(x for name, x in row["over_density"].items() if name != "triton, dense")),
    Bar("a decode step on a quarter of a cache of 32k over the fastest on all of it, batches of 1 and 16, time", 1 / 3,
        "decode", _quarter("triton, a quarter")),
    Bar("the same, as many entries unevenly over the heads", 1 / 3, "decode", _quarter("triton, an uneven quarter")),
)  # fmt: skip


def verdicts() -> Iterator[str]:
    yield "| bar | at most | worst | holds |"
    yield "|---|---:|---:|---|"
    for bar in BARS:
        found = read(bar.part)
        figures = [bar.figure(row) for row in (found or {"rows": []})["rows"]]
        if not figures:
            yield f"| {bar.text} | {bar.limit:.2f} | not measured | |"
            continue
        missed = sum(not x <= bar.limit for x in figures)
        holds = "yes" if not missed else f"**no**, in {missed} of {len(figures)}"
        yield f"| {bar.text} | {bar.limit:.2f} | {max(figures):.3f} | {holds} |"


def _races(part: str, rows: list[Row]) -> Iterator[str]:
    names = list(rows[0]["found"])
    yield f"| | {names[0]} | " + " | ".join(names[1:]) + " |"
    yield "|---|---:|" + "---:|" * (len(names) - 1)
    for row in rows:
        of = ", ".join(f"{row[key]:,} {word}" for key, word in (("tokens", "tokens"), ("batch", "texts")) if key in row)
        first = f"{row['found'][names[0]]['seconds'] * 1000:,.2f} ms"
        cells = (f"{row['found'][n]['ratio']:.2f} ({row['found'][n]['quartiles'][0]:.2f} to "
                 f"{row['found'][n]['quartiles'][1]:.2f})" for n in names[1:])  # fmt: skip
        yield f"| {of} | {first} | " + " | ".join(cells) + " |"


def _laws(rows: list[Row]) -> Iterator[str]:
    broken = {row["method"]: row["broken"] for row in rows if row["broken"]}
    yield f"{len(rows)} methods were tried; {len(broken)} break a law there."
    for name, found in broken.items():
        yield f"- {name}: {', '.join(found)}"


def _tests(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        yield f"- `{row['tests']}`: {row['outcome'].strip('= ')}"
        yield from (f"  - `{name}`" for name in row["failed"])


def _sizes(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        best = "the safe sizes" if row["best"] is None else "{} rows, {} keys, {} warps, {} stages".format(*row["best"])
        yield f"- {row['kind']}, heads {row['width']} wide: {best}"


TITLES = {
    "kernels": "The kernels' tests, without the interpreter",
    "laws": "Laws on the device",
    "tune": "Block sizes",
    "diagnose": "A diagnosis beside a plain forward",
    "prefill": "Sparse prefill, the attention alone",
    "decode": "One decode step, the attention alone",
}


def page() -> str:
    out = ["# On a GPU", ""]
    found: dict[str, Any] = {name: told for name in PARTS if (told := read(name)) is not None and told["rows"]}
    if not found:
        out += ["**Not measured**: no card has been at hand. `make gpu` measures what follows in ten minutes on a",
                "machine that has one. Until then the kernels are known to be right, by Triton's interpreter and by",
                "compiling them for Ampere and Hopper, and nothing is known of their speed.", ""]  # fmt: skip
    out += ["## Bars", "", *verdicts(), ""]
    tellers: dict[str, Callable[[list[Row]], Iterator[str]]] = {"laws": _laws, "kernels": _tests, "tune": _sizes}
    for name, told in found.items():
        facts = told["facts"]
        at = f"{facts['card']}, torch {facts['torch']}, triton {facts['triton']}, transformers {facts['transformers']}"
        part = "" if told["whole"] else "; its time was up before it was through"
        lines = tellers[name](told["rows"]) if name in tellers else _races(name, told["rows"])
        out += [f"## {TITLES[name]}", "", f"{at}{part}.", "", *lines, ""]
    return "\n".join(out)
