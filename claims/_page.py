"""The ledger as a page: how many claims hold, the surest reversals, and each verdict with what would change it."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter

from claims.ledger import FEWEST, HOLDS, RESULTS, REVERSED, UNSEEN, WEAKER, Record, verdict
from heedful.laboratory.differences import Difference, student

SUREST = 3
MOST = 100  # draws beyond which more of them are no plan
ABOUT = f"""# The ledger: which claims hold when someone else measures them

{{counts}}

The surest reversals, by rule: among the claims that came out reversed, those whose 95 % interval lies furthest from \
zero, counted in halves of their own width. That says how little the draws differ, not how large an effect is: one \
that is told against a fixed number instead of a control comes first easily.

{{surest}}

Each row below is one small experiment (`claims/`), run over several draws on two CPU cores; a draw has a seed \
of its own, and in claims made or renewed since that was asked also texts and fits of its own. The verdict comes \
from the effects alone: *{HOLDS}* when the 95 % interval of their mean (Student's t) lies above zero, *{WEAKER}* \
when it does so but the mean is below a bar that the claim's file set, *{REVERSED}* when it lies below zero, \
else *{UNSEEN}*. Where a claim has several controls, each draw is measured against the best of them in that draw, \
which leans against the paper. The last column is reckoned from the effects too: the one more draw that would undo the \
verdict, or how many draws in all would decide if they came out like those at hand. Small models and short runs \
say little about large ones: a verdict is about the direction, here.
"""


def records() -> list[Record]:
    """What is committed, in the order of the papers."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        told = json.loads(path.read_text())
        if "strong" not in told:
            raise ValueError(
                f"{path.name}: strong, the bar for {HOLDS!r}, is missing; python -m claims.ledger --judge adds it"
            )
        found.append(Record(**told))
    return found


def counts(found: list[Record]) -> str:
    """How many claims have which verdict."""
    told = Counter(record.verdict for record in found)
    words = ", ".join(f"{told[word]} {word}" for word in (HOLDS, WEAKER, UNSEEN, REVERSED) if told[word])
    return f"{len(found)} claims measured: {words}."


def sureness(record: Record) -> float:
    """How far the interval lies from zero, in halves of its width: the nearer end's distance."""
    found = Difference.of(record.effects)
    half = (found.high - found.low) / 2
    return math.inf if half == 0 else (abs(found.mean) - half) / half


def surest(found: list[Record]) -> list[Record]:
    """The reversed claims whose intervals lie furthest from zero."""
    return sorted((r for r in found if r.verdict == REVERSED), key=sureness, reverse=True)[:SUREST]


def undoing(effects: list[float], strong: float) -> float:
    """The value of one more draw from which on, towards zero and beyond, a decided verdict is no longer that."""
    mean, said = statistics.fmean(effects), verdict(effects, strong)
    keeps, size = mean, max(map(abs, effects))
    away = -math.copysign(size, mean)
    while verdict([*effects, away], strong) == said:
        away *= 2
    for _ in range(50):
        middle = (keeps + away) / 2
        keeps, away = (middle, away) if verdict([*effects, middle], strong) == said else (keeps, middle)
    return away


def needed(effects: list[float]) -> int | None:
    """How many draws in all would decide if mean and spread stayed; None where that is more than one would make."""
    mean, spread = abs(statistics.fmean(effects)), statistics.stdev(effects)
    counts = range(len(effects) + 1, MOST + 1)
    return next((n for n in counts if mean > student(n) * spread / math.sqrt(n)), None)


def change(record: Record) -> str:
    """What would change the verdict."""
    if record.verdict == UNSEEN:
        draws = needed(record.effects)
        told = f"{draws} draws like these" if draws else f"another effect: more than {MOST} draws like these"
    else:
        side = "above" if record.verdict == REVERSED else "below"
        told = f"one more draw {side} {undoing(record.effects, record.strong):+.3g}"
    if record.verdict == WEAKER:
        told += f"; a mean of {record.strong:g} or more"
    few = len(record.effects) < FEWEST
    return f"{told}; too few to sign: the ledger asks for {FEWEST} draws" if few else told


def interval(record: Record) -> str:
    found = Difference.of(record.effects)
    return f"{found.mean:+.3g} [{found.low:+.3g}, {found.high:+.3g}]"


def table(found: list[Record]) -> str:
    """One row a claim."""
    head = ("paper", "method", "the paper says", "its number", "we measure", "effect", "mean, 95 % interval", "draws")
    rows = [(*head, "verdict", "what would change it"), ("---",) * 10]
    rows += [
        (
            r.key, r.method, r.says, r.paper_number, r.setup, r.effect, interval(r), str(len(r.effects)),
            f"**{r.verdict}**", change(r),
        )
        for r in found
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page() -> str:
    found = records()
    told = "\n".join(
        f"{place}. {r.method} ({r.key}). The paper says: {r.says.rstrip('.')}. Here, {r.effect}: {interval(r)} over "
        f"{len(r.effects)} draws, {sureness(r):.1f} half-widths from zero."
        for place, r in enumerate(surest(found), 1)
    )
    return ABOUT.format(counts=counts(found), surest=told) + "\n" + table(found) + "\n"
