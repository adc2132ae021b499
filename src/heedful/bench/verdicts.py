"""One verdict for each method, from those on its tasks."""

from __future__ import annotations

from heedful.bench.comparison import SHARE, Comparison

VERDICTS = {
    "helps": ("surely better on some task, and safe on every other that it can be asked", "good"),
    "safe": ("surely no worse than by the margin on any task", "good"),
    "unclear": ("no interval is short enough yet, or no task tells; more prompts or minutes may decide", ""),
    "harms": ("surely worse on some task, and by more than the margin on average", "bad"),
    "inactive": ("changed nothing here", "quiet"),
    "refused": ("could not be asked", "quiet"),
}


def margin(c: Comparison) -> str:
    """How much worse a safe method may be, in the units of the tasks."""
    kinds = {about["unit"] for about in c.tasks.values()}
    told = [f"{100 * c.margin:g} points"] * (SHARE in kinds) + [f"{c.margin:g} nats"] * bool(kinds - {SHARE})
    return " or ".join(told)


def verdict(c: Comparison, name: str) -> str:
    """What the comparison says of a method as a whole, a word of VERDICTS."""
    if name in c.inactive:
        return "inactive"
    refused = [r.task for r in c.refused if r.contender == name and r.task in c.tasks]
    if not any(key[1] == name for key in c.verdicts) and refused:
        return "refused"
    told = [task for task in c.tasks if task not in (*c.blind, *refused) and (task, name) not in c.idle]
    words = {c.verdicts.get((task, name), "") for task in told}
    if "worse" in words:
        return "harms"
    if not words or "" in words:
        return "unclear"
    return "helps" if "better" in words else "unclear" if refused else "safe"
