"""What methods cost at each batch, and what holds within so many bytes of cache."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from heedful.bench.advice import holding
from heedful.bench.numbers import MB, size
from heedful.bench.results import PLAIN, Price, Results
from heedful.core.figures import Curves, Figure, Listing, counted


def fitting(c: Results, batch: int) -> list[Price]:
    """What the limit has room for at a batch, the unedited model among it."""
    return [p for p in c.priced[batch] if c.limit is not None and p.cache <= c.limit]


def largest(c: Results, name: str) -> int | None:
    """The largest batch asked at which a method's cache fits."""
    return max((batch for batch in c.batches if any(p.contender == name for p in fitting(c, batch))), default=None)


def within(c: Results) -> Iterable[str]:
    """A sentence for each batch: what to use within the limit."""
    limit = c.limit
    if limit is None:
        return
    for batch in c.batches:
        prices = {p.contender: p for p in c.priced[batch]}
        if PLAIN not in prices:
            continue
        plain = prices[PLAIN]
        fit = [p.contender for p in fitting(c, batch)]
        whole = f"the unedited model ({size(plain.cache)})"
        good = sorted((n for n in fit if n in holding(c)), key=lambda n: -c.worth[n].mean)
        open_ = [n for n in fit if c.verdict(n) == "unclear"]
        where = f"Within {size(limit)} of cache, at batch {batch} and {counted(plain.tokens, 'token')}"
        if PLAIN in fit:
            yield f"{where}, {whole} fits."
        elif good:
            best = prices[good[0]]
            more = f"; {', '.join(good[1:])} would do as well" if good[1:] else ""
            yield f"{where}, use {best.contender} ({size(best.cache)}){more}; {whole} does not fit."
        elif fit:
            yet = f" yet: undecided are {', '.join(open_)}" if open_ else ""
            yield f"{where}, nothing that fits is known to hold{yet}; {whole} does not fit."
        else:
            least = min(prices.values(), key=lambda p: p.cache)
            yield f"{where}, nothing fits: {least.contender} takes least, {size(least.cache)}."


def by_batch(c: Results) -> Iterable[Figure]:
    """Throughput and memory as batches grow."""
    names = [name for name in c.contenders if name not in c.inactive]
    found = {(p.contender, rows): p for rows in c.batches for p in c.priced[rows]}
    told = [(name, rows, found[name, rows]) for name in names for rows in sorted(c.batches) if (name, rows) in found]
    if not told:
        return
    batches = sorted(c.batches)
    rates = {
        name: torch.tensor([_rate(found.get((name, rows))) for rows in batches])
        for name in dict.fromkeys(name for name, _, _ in told)
    }
    what = f"Every row of a batch is the same prompt of {counted(told[0][2].tokens, 'token')}."
    if any(bool(rate.isfinite().any()) for rate in rates.values()):
        more = f"Tokens that all rows together go on by in a second; more is better. {what}"
        yield Curves("throughput", "Generation by batch", more, batches, rates, "batch", "tokens a second", log_x=True)
    yield Listing(
        "batches",
        "What each costs by batch",
        f"{what} Cache and peak are of all rows together; the peak is what prefill takes above the resting model.",
        ("method", "batch", "prefill, tokens/s", "generation, tokens/s", "cache, MB", "peak, MB"),
        [
            (name, rows, p.read_rate, p.write_rate, p.cache / MB, None if p.peak is None else p.peak / MB)
            for name, rows, p in told
        ],
    )


def _rate(price: Price | None) -> float:
    """Tokens that follow a second; nan where nobody knows, or none does."""
    rate = None if price is None else price.write_rate
    return math.nan if rate is None else rate
