"""The bars that the speed records are held against, and which hold on which machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.timing import label, load

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A figure of every row that it speaks of must be at most `limit`."""

    text: str
    limit: float
    record: str
    figure: Callable[[Row], float | None]  # None: the bar does not speak of this row


def ratio(name: str, **of: Any) -> Callable[[Row], float | None]:
    """The ratio of one contender to the baseline, in rows that have these values."""

    def figure(row: Row) -> float | None:
        there = name in row["found"] and all(row.get(key) in want for key, want in of.items())
        return float(row["found"][name]["ratio"]) if there else None

    return figure


def memory(name: str, over: str, lengths: tuple[int, ...]) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        there = row["tokens"] in lengths and {name, over} <= set(row["peak_mb"])
        return row["peak_mb"][name] / row["peak_mb"][over] if there else None

    return figure


def over(name: str, other: str, tokens: int) -> Callable[[Row], float | None]:
    """Time of one contender over that of another."""

    def figure(row: Row) -> float | None:
        there = row["tokens"] == tokens and {name, other} <= set(row["found"])
        return row["found"][name]["seconds"] / row["found"][other]["seconds"] if there else None

    return figure


def held(row: Row) -> float | None:
    """Bytes of a cut cache over those of the whole one, the worse of even and uneven."""
    return max(row["bytes"]["quarter"], row["bytes"]["uneven quarter"]) / row["bytes"]["whole"]


def paid(row: Row) -> float | None:
    """Time over SDPA's, divided by the share of pairs that is computed."""
    return row["over_density"] if row["tokens"] == 8192 and "method" in row else None


def fastest(row: Row) -> float | None:
    """Time over SDPA's of the fastest method that costs little enough loss; infinite where none does."""
    if row["tokens"] != 8192 or "best" not in row:
        return None
    return float(row["found"]["attention"]["ratio"]) if row["rise"] < ENOUGH else math.inf


def slowest(row: Row) -> float | None:
    """The highest ratio to the baseline, which stands first."""
    others = list(row["found"].values())[1:]
    return max(float(x["ratio"]) for x in others) if row["tokens"] == 4096 else None


def quickest(kind: str) -> Callable[[Row], float | None]:
    """Time with statistics over that of the fastest of torch's own."""

    def figure(row: Row) -> float | None:
        if row["type"] != kind:
            return None
        own = [x["seconds"] for name, x in row["found"].items() if not name.startswith(("native", "tiled"))]
        return float(row["found"][STATISTICS]["seconds"] / min(own))

    return figure


ENOUGH = 0.01  # relative rise of the loss below which a method costs little enough to be the fastest
LONG = (2048, 8192)
STATISTICS = "native, row and key statistics"
BARS = (
    Bar("default diagnose with `native` over a plain forward, 2k and 8k tokens, time", 1.00, "model",
        ratio("diagnose, native", tokens=LONG)),
    Bar("the same over a forward that, like diagnose, computes the last logits alone, 2k tokens, time", 1.00, "model",
        over("diagnose, native", "plain forward, last logits", 2048)),
    Bar("the same, 8k tokens, time", 1.00, "model", over("diagnose, native", "plain forward, last logits", 8192)),
    Bar("the whole of diagnose over such a forward, one text of 2k tokens, time", 1.35, "diagnose",
        ratio("diagnose, the whole", windows=(1,))),
    Bar("the same, ten windows of 2k tokens, over as many forwards, time", 1.05, "diagnose",
        ratio("diagnose, the whole", windows=(10,))),
    Bar("default readers with `tiled` over such a forward, 2k tokens, time", 1.35, "diagnose",
        ratio("diagnose, tiled", windows=(1,))),
    Bar("default diagnose with `tiled` over a plain forward, 2k and 8k tokens, time", 1.35, "model",
        ratio("diagnose, tiled", tokens=LONG)),
    Bar("default diagnose with `native` over a plain forward, 2k and 8k tokens, peak memory", 1.10, "memory",
        memory("diagnose, native", "plain forward", LONG)),
    Bar("the same over a forward that computes the last logits alone, 2k and 8k tokens, peak memory", 1.10, "memory",
        memory("diagnose, native", "plain forward, last logits", LONG)),
    Bar("default diagnose over `output_attentions=True`, 2k tokens, time", 0.25, "model",
        over("diagnose, native", "output_attentions", 2048)),
    Bar("default diagnose over `output_attentions=True`, 2k tokens, peak memory", 0.20, "memory",
        memory("diagnose, native", "output_attentions", (2048,))),
    Bar("an attached run that edits and reads nothing over the same forward, 2k tokens, time", 1.01, "model",
        over("attached, nothing to do", "plain forward, last logits", 2048)),
    Bar("attention with row and key statistics over SDPA, float32, 1k to 16k tokens, time", 0.95, "attention",
        ratio(STATISTICS, type=("float32",))),
    Bar("attention with row and key statistics over SDPA, bfloat16, 1k to 16k tokens, time", 0.60, "attention",
        ratio(STATISTICS, type=("bfloat16",))),
    Bar("the same under a window, bias, soft cap or sinks, over the fastest of torch's, float32, 1k and 2k, time", 0.95,
        "under", quickest("float32")),
    Bar("the same, bfloat16", 0.60, "under", quickest("bfloat16")),
    Bar("one decode step over SDPA's grouped call, float32, caches of 8k to 32k, time", 0.90, "decode_step",
        ratio("native", type=("float32",))),
    Bar("one decode step over SDPA's grouped call, bfloat16, caches of 8k to 32k, time", 0.20, "decode_step",
        ratio("native", type=("bfloat16",))),
    Bar("the attention of a decode step with a quarter of the cache over the packed whole one, 8k tokens, time", 0.286,
        "cache", ratio("native, a quarter", tokens=(8192,))),
    Bar("the same, as many entries unevenly over the heads, 8k tokens, time", 0.286, "cache",
        ratio("native, an uneven quarter", tokens=(8192,))),
    Bar("append, attend and drop, the choice not included, a quarter over the packed whole cache, 8k tokens, time",
        0.286, "cache", over("append, native, drop, a quarter", "append to the whole cache, packed", 8192)),
    Bar("the same, as many entries unevenly over the heads", 0.286, "cache",
        over("append, native, drop, an uneven quarter", "append to the whole cache, packed", 8192)),
    Bar("an edit of the pattern (ACT, every layer) over a plain forward, 2k tokens, time", 1.35, "pattern",
        ratio("ACT", tokens=(2048,))),
    Bar("sparse prefill attention, choosing included, over density x SDPA, 8k tokens, time", 1.10, "sparse", paid),
    Bar("the fastest of these at under 1 % rise of the loss over SDPA, 8k tokens, time", 0.40, "sparse", fastest),
    Bar("the slowest linear attention over SDPA, 4k tokens, time", 1.00, "linear", slowest),
    Bar("bytes held for a quarter of the cache, even or uneven, 8k tokens", 0.26, "cache", held),
)  # fmt: skip


def found(bar: Bar, told: dict[str, Any]) -> str:
    """A bar's worst figure on one machine, and where, if it is too high."""
    figures = [(x, row) for row in told["rows"] if (x := bar.figure(row)) is not None]
    if not figures:
        return ""
    missed = [x for x, _ in figures if x > bar.limit]
    worst, row = max(figures, key=lambda pair: pair[0])
    return f"**{worst:.3f}**, in {len(missed)} of {len(figures)}: {where(row)}" if missed else f"{worst:.3f}"


def verdicts() -> Iterator[str]:
    """Each bar with its worst figure on each kind of machine."""
    records = {name: {label(told): told for told in load(name)} for name in {bar.record for bar in BARS}}
    machines = sorted({name for record in records.values() for name in record})
    yield "| bar | at most | " + " | ".join(machines) + " |"
    yield "|---|---:|" + "---|" * len(machines)
    for bar in BARS:
        cells = (found(bar, there[name]) if name in (there := records[bar.record]) else "" for name in machines)
        yield f"| {bar.text} | {bar.limit:.2f} | " + " | ".join(cells) + " |"


def where(row: Row) -> str:
    return (
        ", ".join(str(row[key]) for key in ("shape", "type") if key in row)
        + (" at " if "shape" in row else "")
        + f"{row['tokens']:,} tokens"
        + (f", {row['windows']} window{'s' if row['windows'] > 1 else ''}" if "windows" in row else "")
        + (f", {row['best']}, {row['rise']:+.2%} loss" if "best" in row else "")
        + (f", {row['rise_elsewhere']:+.2%} on the end of these texts" if row.get("rise_elsewhere") is not None else "")
    )
