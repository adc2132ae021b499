"""The bars that the speed records are held against, and the docs page that says which hold."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.timing import RECORDS

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
    """The highest ratio to the baseline."""
    return max(float(x["ratio"]) for x in row["found"].values()) if row["tokens"] == 4096 else None


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
    Bar("default diagnose with `native` over a plain forward, 2k and 8k tokens, peak memory", 1.10, "model",
        memory("diagnose, native", "plain forward", LONG)),
    Bar("the same over a forward that computes the last logits alone, 2k and 8k tokens, peak memory", 1.10, "model",
        memory("diagnose, native", "plain forward, last logits", LONG)),
    Bar("default diagnose over `output_attentions=True`, 2k tokens, time", 0.25, "model",
        over("diagnose, native", "output_attentions", 2048)),
    Bar("default diagnose over `output_attentions=True`, 2k tokens, peak memory", 0.20, "model",
        memory("diagnose, native", "output_attentions", (2048,))),
    Bar("an attached run that edits and reads nothing over the same forward, 2k tokens, time", 1.01, "model",
        over("attached, nothing to do", "plain forward, last logits", 2048)),
    Bar("attention with row and key statistics over SDPA, float32, 1k to 16k tokens, time", 0.95, "attention",
        ratio(STATISTICS, type=("float32",))),
    Bar("attention with row and key statistics over SDPA, bfloat16, 1k to 16k tokens, time", 0.60, "attention",
        ratio(STATISTICS, type=("bfloat16",))),
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


def load(name: str) -> dict[str, Any] | None:
    path = RECORDS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def exponents(rows: list[Row]) -> dict[str, float]:
    """The slope of time against length, both as logarithms, of those that ran at every length."""
    x = [math.log(row["tokens"]) for row in rows]
    slopes = {}
    for name in rows[0]["found"]:
        if all(name in row["found"] for row in rows):
            y = [math.log(row["found"][name]["seconds"]) for row in rows]
            slopes[name] = statistics.linear_regression(x, y).slope
    return slopes


def _where(row: Row) -> str:
    return (
        ", ".join(str(row[key]) for key in ("shape", "type") if key in row)
        + (" at " if "shape" in row else "")
        + f"{row['tokens']:,} tokens"
        + (f", {row['windows']} window{'s' if row['windows'] > 1 else ''}" if "windows" in row else "")
        + (f", {row['best']}, {row['rise']:+.2%} loss" if "best" in row else "")
        + (f", {row['rise_elsewhere']:+.2%} on the end of these texts" if row.get("rise_elsewhere") is not None else "")
    )


def verdicts() -> Iterator[str]:
    """Each bar with its worst figure."""
    yield "| bar | at most | worst | where | holds |"
    yield "|---|---:|---:|---|---|"
    for bar in BARS:
        found = load(bar.record)
        figures = [(x, row) for row in (found or {"rows": []})["rows"] if (x := bar.figure(row)) is not None]
        if not figures:
            yield f"| {bar.text} | {bar.limit:.2f} | not measured | | |"
            continue
        missed = [x for x, _ in figures if x > bar.limit]
        worst, row = max(figures, key=lambda pair: pair[0])
        told = "yes" if not missed else f"**no**, in {len(missed)} of {len(figures)}"
        yield f"| {bar.text} | {bar.limit:.2f} | {worst:.3f} | {_where(row)} | {told} |"


def _races(name: str) -> Iterator[str]:
    """Every row of a record, by contender, as ratio and quartiles."""
    found = load(name)
    if found is None:
        return
    names = list(dict.fromkeys(n for row in found["rows"] for n in row["found"]))
    base, *others = names
    yield f"| | {base} | " + " | ".join(others) + " |"
    yield "|---|---:|" + "---:|" * len(others)
    for row in found["rows"]:
        cells = [f"{row['found'][base]['seconds'] * 1000:,.1f} ms"]
        for other in others:
            x = row["found"].get(other)
            cells.append("" if x is None else f"{x['ratio']:.2f} ({x['quartiles'][0]:.2f} to {x['quartiles'][1]:.2f})")
        yield f"| {_where(row)} | " + " | ".join(cells) + " |"


def _machine(name: str) -> str:
    found = load(name)
    if found is None:
        return "Not measured yet."
    m = found["machine"]
    return (
        f"{m['cpu']}, torch path {m['torch_path']}, our path {m['native']}, {m['threads']} threads, "
        f"torch {m['torch']}, transformers {m['transformers']}; load average {m['load']} at the end."
    )


def page() -> str:
    """The docs page."""
    out = ["# Speed", "", "Measured by `make bars` on one machine; every figure is a ratio to its",
           "baseline in the same run, contenders taking turns: median, with the quartiles in brackets.", "",
           "## Bars", "", *verdicts(), ""]  # fmt: skip
    model = load("model")
    if model is not None:
        told = ", ".join(f"{name} N^{x:.2f}" for name, x in exponents(model["rows"]).items())
        out += [f"Growth of time with the length of the text, 1k to 8k tokens: {told}.", ""]
    out += ["## The whole model", "", _machine("model"), "", *_races("model"), ""]
    if model is not None:
        told = "Peak memory of a process, in MB (of five where a range is given: the median):"
        out += [told, "", *_peaks(model["rows"]), ""]
    out += ["## The whole of diagnose", "", _machine("diagnose"), "", *_races("diagnose"), ""]
    out += ["## Peers", "", *_peers(), ""]
    out += ["## The attention call alone", "", _machine("attention"), "", *_races("attention"), ""]
    out += ["## The attention call and the way back", "", _machine("training"), "", *_races("training"), ""]
    if (found := load("training")) is not None:
        out += ["Peak memory beyond inputs and libraries, in MB:", "", *_peaks(found["rows"]), ""]
    out += ["## One decode step", "", _machine("decode_step"), "", *_races("decode_step"), ""]
    out += ["## Edits of scores and pattern, the whole model", "", _machine("pattern"), "", *_races("pattern"), ""]
    out += ["## Sparse prefill", "", *_sparse(), ""]
    out += ["## Linear attention, the call alone", "", _machine("linear"), "", *_races("linear"), "", *_faster_from()]
    out += ["## One decode step after a cut to a quarter", "", _machine("cache"), "", *_races("cache"), ""]
    return "\n".join(out)


def _peaks(rows: list[Row]) -> Iterator[str]:
    names = list(dict.fromkeys(n for row in rows for n in row["peak_mb"]))
    yield "| | " + " | ".join(names) + " |"
    yield "|---|" + "---:|" * len(names)
    for row in rows:
        cells = [_peak(row, n) for n in names]
        yield f"| {row['tokens']:,} tokens | " + " | ".join(cells) + " |"


def _peak(row: Row, name: str) -> str:
    if name not in row["peak_mb"]:
        return ""
    low, high = row.get("peak_range", {}).get(name, (None, None))
    return f"{row['peak_mb'][name]:,.0f}" + ("" if low is None else f" ({low:,.0f} to {high:,.0f})")


def _faster_from() -> Iterator[str]:
    """From how many tokens on each linear mechanism is faster than SDPA."""
    if (found := load("linear")) is not None:
        told = (f"{name} from {n:,}" if n else f"{name} at none of these" for name, n in found["faster_from"].items())
        yield f"Faster than SDPA, of the lengths tried: {', '.join(told)}."
        yield ""


def _sparse() -> Iterator[str]:
    """Each method with what it computes, takes and costs; then the kernel on random tables."""
    found = load("sparse")
    yield _machine("sparse")
    if found is None:
        return
    yield ""
    yield "| | tokens | pairs computed | time over SDPA | over density x SDPA | choosing, of the time | rise of loss |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for row in found["rows"]:
        if "method" in row:
            rise = "" if row["rise"] is None else f"{row['rise']:+.2%}"
            ratio = row["found"]["attention"]["ratio"]
            yield (
                f"| {row['method']} | {row['tokens']:,} | {row['density']:.1%} | {ratio:.2f} "
                f"| {row['over_density']:.2f} | {row['choosing']:.1%} | {rise} |"
            )
    yield ""
    yield found.get("chosen", "")
    yield ""
    yield "The kernel alone on random blocks of 64, a table for each head: time over SDPA (over density x SDPA)."
    yield ""
    for number, row in enumerate(row for row in found["rows"] if "table" in row):
        if number == 0:
            yield "| tokens | " + " | ".join(row["density"]) + " |"
            yield "|---:|" + "---:|" * len(row["density"])
        cells = [f"{row['found'][x]['ratio']:.2f} ({row['over_density'][x]:.2f})" for x in row["density"]]
        yield f"| {row['tokens']:,} | " + " | ".join(cells) + " |"


def _peers() -> Iterator[str]:
    found = load("peers")
    if found is None:
        yield "Not measured yet."
        return
    yield f"Each asked for the {found['asked']}; {found['model']}, each in the same environment of its own."
    yield ""
    yield "| | version | tokens | seconds (range) | over plain | peak MB |"
    yield "|---|---|---:|---:|---:|---:|"
    plain = next((row["seconds"] for row in found["rows"] if row["peer"] == "plain"), None)
    for row in found["rows"]:
        if "failed" in row:
            yield f"| {row['peer']} | | {row['tokens']:,} | did not run: {row['failed']} | | |"
            continue
        low, high = row["spread"]
        ratio = row["seconds"] / plain if plain else float("nan")
        yield (
            f"| {row['peer']} | {row['version']} | {row['tokens']:,} | {row['seconds']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {ratio:.2f} | {row['peak_mb']:,.0f} |"
        )
