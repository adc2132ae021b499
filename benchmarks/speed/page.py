"""docs/speed.md: which bars hold, and the records behind them, machine by machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.speed.bars import Row, verdicts, where
from benchmarks.speed.mechanisms import BASE, FLOOR
from benchmarks.speed.mechanisms import pays as pays_from
from benchmarks.speed.timing import label, load

WHOLE = 0.9  # a share of pairs below this is what a mechanism is for
Told = dict[str, Any]  # what one machine gave
Table = Callable[[Told], Iterator[str]]


def races(told: Told) -> Iterator[str]:
    """Every row of a record, by contender, as ratio and quartiles."""
    base, *others = dict.fromkeys(name for row in told["rows"] for name in row["found"])
    yield from _head("", base, *others)
    for row in told["rows"]:
        cells = [f"{row['found'][base]['seconds'] * 1000:,.1f} ms"]
        for other in others:
            x = row["found"].get(other)
            cells.append("" if x is None else f"{x['ratio']:.2f} ({x['quartiles'][0]:.2f} to {x['quartiles'][1]:.2f})")
        yield _row(where(row), *cells)


def exponents(rows: list[Row]) -> dict[str, float]:
    """The slope of time against length, both as logarithms, of those that ran at every length."""
    x = [math.log(row["tokens"]) for row in rows]
    slopes = {}
    for name in rows[0]["found"]:
        if all(name in row["found"] for row in rows):
            y = [math.log(row["found"][name]["seconds"]) for row in rows]
            slopes[name] = statistics.linear_regression(x, y).slope
    return slopes


def growth(told: Told) -> Iterator[str]:
    slopes = ", ".join(f"{name} N^{x:.2f}" for name, x in exponents(told["rows"]).items())
    yield f"Growth of time with the length of the text: {slopes}."


def peaks(told: Told) -> Iterator[str]:
    yield "Peak memory of a process, in MB (of several where a range is given: the median):"
    yield from _memory(told)


def beyond(told: Told) -> Iterator[str]:
    yield "Peak memory beyond inputs and libraries, in MB:"
    yield from _memory(told)


def operations(told: Told) -> Iterator[str]:
    yield "What is added to a layer, in operations of torch's and, in brackets, looks at a number of theirs:"
    yield ""
    yield from _head("", *told["rows"][0]["added"])
    for row in told["rows"]:
        yield _row(where(row), *(f"{done:.0f} ({looks:.0f})" for done, looks in row["added"].values()))


def _memory(told: Told) -> Iterator[str]:
    names = list(dict.fromkeys(n for row in told["rows"] for n in row["peak_mb"]))
    yield ""
    yield from _head("", *names)
    for row in told["rows"]:
        yield _row(f"{row['tokens']:,} tokens", *(_peak(row, name) for name in names))


def _peak(row: Row, name: str) -> str:
    if name not in row["peak_mb"]:
        return ""
    low, high = row.get("peak_range", {}).get(name, (None, None))
    return f"{row['peak_mb'][name]:,.0f}" + ("" if low is None else f" ({low:,.0f} to {high:,.0f})")


def faster_from(told: Told) -> Iterator[str]:
    """From how many tokens on each linear mechanism is faster than SDPA."""
    froms = (f"{name} from {n:,}" if n else f"{name} at none of these" for name, n in told["faster_from"].items())
    yield f"Faster than SDPA, of the lengths tried: {', '.join(froms)}."


def methods(told: Told) -> Iterator[str]:
    """Each sparse method with what it computes, takes and costs."""
    yield from _head(
        "", "tokens", "pairs computed", "time over SDPA", "over density x SDPA", "choosing, of the time", "rise of loss"
    )
    for row in told["rows"]:
        if "method" in row:
            rise = "" if row["rise"] is None else f"{row['rise']:+.2%}"
            ratio = row["found"]["attention"]["ratio"]
            yield _row(
                row["method"], f"{row['tokens']:,}", f"{row['density']:.1%}", f"{ratio:.2f}",
                f"{row['over_density']:.2f}", f"{row['choosing']:.1%}", rise,
            )  # fmt: skip
    yield ""
    yield told.get("chosen", "")


def tables(told: Told) -> Iterator[str]:
    """The kernel on random tables of blocks."""
    yield "The kernel alone on random blocks of 64, a table for each head: time over SDPA (over density x SDPA)."
    yield ""
    rows = [row for row in told["rows"] if "table" in row]
    if rows:
        yield from _head("tokens", *rows[0]["density"])
    for row in rows:
        cells = (f"{row['found'][x]['ratio']:.2f} ({row['over_density'][x]:.2f})" for x in row["density"])
        yield _row(f"{row['tokens']:,}", *cells)


def peers(told: Told) -> Iterator[str]:
    yield f"Each asked for the {told['asked']}; {told['model']}, each in the same environment of its own."
    yield ""
    yield from _head("", "version", "tokens", "seconds (range)", "over plain", "peak MB")
    plain = next((row["seconds"] for row in told["rows"] if row["peer"] == "plain"), math.nan)
    for row in told["rows"]:
        if "failed" in row:
            yield _row(row["peer"], "", f"{row['tokens']:,}", f"did not run: {row['failed']}", "", "")
            continue
        low, high = row["spread"]
        took = f"{row['seconds']:.2f} ({low:.2f} to {high:.2f})"
        ratio, peak = f"{row['seconds'] / plain:.2f}", f"{row['peak_mb']:,.0f}"
        yield _row(row["peer"], row["version"], f"{row['tokens']:,}", took, ratio, peak)


def mechanisms(told: Told) -> Iterator[str]:
    """Each mechanism's layer over softmax's, by length, and from which length it is the faster one."""
    lengths = list(dict.fromkeys(row["tokens"] for row in told["rows"]))
    yield "Seconds of one core over those of softmax in the same layer, projections and all; below 1 is faster. Where"
    yield "nothing stands, a shorter text foretold too long a step, or so long a one is refused. Share"
    yield "of pairs: what is computed at the greatest length tried, and by how much the time exceeds such a share"
    yield f"of softmax's, of both without what such a layer takes without attention, {FLOOR}'s time in one; nothing"
    yield "where that was not tried, and 0 where nothing is left of the time. *both* attends to both sides, the others"
    yield "to the past, in layers that turn tokens by their places, which those to both sides do not."
    yield ""
    ways = {"there": "there", "and_back": "there and back"}
    heads = [f"{said}, {n:,}" for said in ways.values() for n in lengths]
    yield from _head("", *heads, "there, faster from", "there and back, from", "share of pairs", "over share, there")
    for name, causal in sorted({(row["method"], row["causal"]) for row in told["rows"] if "there" in row}):
        mine = [row for row in told["rows"] if (row["method"], row["causal"]) == (name, causal)]
        by_length = {row["tokens"]: row for row in mine if "there" in row}
        cells = [f"{by_length[n][what][name]['ratio']:.2f}" if n in by_length else "" for what in ways for n in lengths]
        pays = (pays_from(mine, what)[name] for what in ways)
        last = by_length[max(by_length)]
        share, over = last.get("density", 1.0), over_share(last, told["rows"])
        shares = (f"{share:.1%}", "" if over is None else f"{over:.2f}") if share < WHOLE else ("", "")
        froms = (f"{n:,}" if n else "" for n in pays)
        yield _row(name if causal else f"{name} (*both*)", *cells, *froms, *shares)
    ran = {row["method"] for row in told["rows"] if "there" in row}
    cannot = sorted({row["method"] for row in told["rows"] if row.get("why", "").startswith("cannot")} - ran)
    yield ""
    yield f"In no such layer by themselves: {', '.join(cannot)}." if cannot else ""


def over_share(row: Row, rows: list[Row]) -> float | None:
    """A mechanism's time there over its share of softmax's, both without what such a layer takes without attention."""
    alike = [other for other in rows if all(other[x] == row[x] for x in ("causal", "tokens")) and "there" in other]
    floor = next((other["there"][FLOOR]["seconds"] for other in alike if other["method"] == FLOOR), None)
    if floor is None:
        return None
    mine, whole = (row["there"][name]["seconds"] - floor for name in (row["method"], BASE))
    return max(0.0, mine) / whole / row.get("density", 1.0)


HEAD = (
    "Measured by `make bars`; every figure is a ratio to its baseline in the same run on the same machine, contenders",
    "taking turns: median, with the quartiles in brackets. Kinds of machine stand beside one another. A bar that is",
    "missed is in bold, with where it is missed by most.",
)
SECTIONS: tuple[tuple[str, str, tuple[Table, ...]], ...] = (
    ("The whole model", "model", (races, growth)),
    ("Its memory", "memory", (peaks,)),
    ("The whole of diagnose", "diagnose", (races,)),
    ("Peers", "peers", (peers,)),
    ("The attention call alone", "attention", (races,)),
    ("The attention call under what models do to their scores", "under", (races,)),
    ("The attention call and the way back", "training", (races, beyond)),
    ("One decode step", "decode_step", (races,)),
    ("A written token, the whole model", "decoding", (races, operations)),
    ("Edits of scores and pattern, the whole model", "pattern", (races,)),
    ("Sparse prefill", "sparse", (methods, tables)),
    ("Linear attention, the call alone", "linear", (races, faster_from)),
    ("Mechanisms in a layer of one's own", "mechanisms", (mechanisms,)),
    ("One decode step after a cut to a quarter", "cache", (races,)),
)


def page() -> str:
    """The docs page."""
    out = ["# Speed", "", *HEAD, "", "## Bars", "", *verdicts(), ""]
    for title, name, drawn in SECTIONS:
        out += [f"## {title}", ""]
        measured = sorted(load(name), key=label)
        for told in measured:
            out += [f"**{_machine(told)}**", ""]
            for table in drawn:
                out += [*table(told), ""]
        if not measured:
            out += ["Not measured yet.", ""]
    return "\n".join(out)


def _machine(told: Told) -> str:
    m = told["machine"]
    return (
        f"{label(told)}; our path {m['native']}, {m['threads']} threads, torch {m['torch']}, "
        f"transformers {m['transformers']}; load average {m['load']} at the end."
    )


def _head(first: str, *names: str) -> Iterator[str]:
    yield _row(first, *names)
    yield "|---|" + "---:|" * len(names)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
