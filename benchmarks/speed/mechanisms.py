"""Every mechanism in the layer that one builds with it, there and there and back, against softmax; it resumes.

A layer is `heedful.nn.Attention`: projections, rotary embedding and what the mechanism learns are timed too.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.patterns import RECORD as PATTERNS
from benchmarks.patterns import YES, mechanisms
from benchmarks.speed import timing
from benchmarks.speed.bars import Row
from benchmarks.speed.linear import faster_from
from heedful.core.errors import HeedfulError
from heedful.core.method import Method
from heedful.core.regions import Region
from heedful.nn import Attention

NAME = "mechanisms"
WAYS = ("there", "and_back")
CANNOT = "cannot: "
WIDTH, HEADS = 64, 2
LENGTHS = (1024, 4096, 16384)
BASE = "softmax"
PATIENCE = 20.0  # seconds that one way there and back may take, as foretold by the length before


def layer(method: Method | None, causal: bool, n: int) -> tuple[Attention, Tensor]:
    """The layer and its input, whose tokens are patches of a square image too."""
    torch.manual_seed(0)
    made = Attention(WIDTH, HEADS, method, causal=causal, rotary=10_000.0 if causal else None, batch_first=True)
    side = round(n**0.5)
    made.run.roles = {"patches": Region(((0, n),), (side, side))}
    return made, torch.randn(1, n, WIDTH)


def there(made: Attention, x: Tensor) -> Tensor:
    heads, _ = made(x, x, x, need_weights=False)
    return heads


def and_back(made: Attention, x: Tensor) -> None:
    with torch.enable_grad():
        learned = [p for p in made.parameters() if p.requires_grad]
        torch.autograd.grad(there(made, x).sum(), learned, allow_unused=True)


def spent(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """As `race`, in seconds of one core, which others on the machine do not take from it."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, way in ways.items():
                began = time.process_time()
                way()
                if turn:
                    taken[name].append(time.process_time() - began)
    return timing.told(taken, BASE)


def asked(method: Method, causal: bool, n: int, rounds: int) -> Row:
    """One mechanism at one length."""
    kinds: dict[str, Method | None] = {BASE: None, type(method).__name__: method}
    made = {name: layer(kind, causal, n) for name, kind in kinds.items()}
    row: Row = {"method": type(method).__name__, "settings": repr(method), "causal": causal, "tokens": n}
    row["there"] = spent({name: partial(there, *each) for name, each in made.items()}, rounds)
    row["and_back"] = spent({name: partial(and_back, *each) for name, each in made.items()}, rounds)
    density = made[row["method"]][0].run.activity().density
    if density:
        row["density"] = round(min(1.0, sum(density.values()) / len(density) * (2 * n / (n + 1) if causal else 1)), 4)
    return row


def measure(lengths: tuple[int, ...] = LENGTHS, rounds: int = 3, patience: float = PATIENCE) -> None:
    """Each mechanism that attends to its own text causally, or to both sides, from the shortest length on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    own = timing.label({"machine": timing.machine()})
    rows: list[Row] = [row for told in timing.load(NAME) if timing.label(told) == own for row in told["rows"]]
    answers = {name: row["found"] for name, row in json.loads(PATTERNS.read_text(encoding="utf-8"))["rows"].items()}
    for n, (name, method) in product(lengths, mechanisms().items()):
        found = answers.get(name, {})
        causal = found.get("self, causal") == YES and "text" in method.subjects
        if not causal and found.get("self") != YES:
            continue
        past = [row for row in rows if row["method"] == name and row["tokens"] <= n]
        if past and (past[-1].get("why", "").startswith(CANNOT) or (past[-1]["tokens"] == n and "there" in past[-1])):
            continue
        rows = [row for row in rows if (row["method"], row["tokens"]) != (name, n)]
        before = [row for row in past if row["tokens"] < n and "there" in row]
        slowest = before[-1]["and_back"][name]["seconds"] * (n / before[-1]["tokens"]) ** 2 if before else 0.0
        rows.append(_row(method, causal, n, rounds, slowest, patience))
        timing.record(
            NAME, rows, baseline=BASE, inputs=f"random, one text or square image, {HEADS} heads of {WIDTH // HEADS}"
        )
    torch.set_num_threads(threads)


def _row(method: Method, causal: bool, n: int, rounds: int, foretold: float, patience: float) -> Row:
    name = type(method).__name__
    row: Row = {"method": name, "causal": causal, "tokens": n}
    if foretold > patience:
        return row | {"why": f"{foretold:.0f} s a step foretold"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for made in (type(method), lambda: method):  # by its own settings, or its example's
            try:
                row = asked(made(), causal, n, rounds)
                break
            except (HeedfulError, TypeError) as error:
                row["why"] = f"{CANNOT}{str(error).splitlines()[0]}"
    ratios = {what: row[what][name]["ratio"] for what in WAYS if what in row}
    print(name, n, ratios, row.get("density", ""), row.get("why", ""), flush=True)
    return row


def pays(rows: list[Row], what: str) -> dict[str, int | None]:
    """The fewest tokens from which on each is faster than softmax at every length that was tried; None: never."""
    found: dict[str, int | None] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        tried = [{"tokens": row["tokens"], "found": row[what]} for row in rows if row["method"] == name and what in row]
        if tried:
            found[name] = faster_from([{**row, "found": {name: row["found"][name]}} for row in tried])[name]
    return found
