"""Every mechanism in the layer that one builds with it, there and there and back, against softmax; it resumes.

A layer is `heedful.nn.Attention`: projections, rotary embedding and what the mechanism learns are timed too.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Collection, Mapping
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
FLOOR = "NoMixing"  # a layer's projections, and no attention: timed in both kinds of layer
TOGETHER = 8  # mechanisms that take turns with one softmax, which at the greatest length takes longer than most
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
    """As `race`, in seconds of one core, which others on the machine do not take from it; all have run before."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _, (name, way) in product(range(rounds), ways.items()):
            began = time.process_time()
            way()
            taken[name].append(time.process_time() - began)
    return timing.told(taken, BASE)


Made = tuple[Attention, Tensor]


def warmed(method: Method | None, causal: bool, n: int) -> Made:
    """A layer and its input that have run, there and there and back."""
    made = layer(method, causal, n)
    with torch.no_grad():
        there(*made)
    and_back(*made)
    return made


def asked(base: Made, made: Mapping[str, Made], causal: bool, n: int, rounds: int) -> list[Row]:
    """Some mechanisms at one length, in turns with softmax."""
    found = {
        what: spent({name: partial(way, *each) for name, each in {BASE: base, **made}.items()}, rounds)
        for what, way in zip(WAYS, (there, and_back), strict=True)
    }
    rows = []
    for name, (attention, _) in made.items():
        row: Row = {"method": name, "settings": repr(attention.method.parts[0]), "causal": causal, "tokens": n}
        row |= {what: {x: told[x] for x in (BASE, name)} for what, told in found.items()}
        if density := attention.run.activity().density:
            whole = 2 * n / (n + 1) if causal else 1
            row["density"] = round(min(1.0, sum(density.values()) / len(density) * whole), 4)
        print(name, n, {what: row[what][name]["ratio"] for what in WAYS}, row.get("density", ""), flush=True)
        rows.append(row)
    return rows


def measure(
    lengths: tuple[int, ...] = LENGTHS, rounds: int = 3, patience: float = PATIENCE, again: Collection[str] = ()
) -> None:
    """Each mechanism that attends to its own text causally, or else to both sides, from the shortest length on.

    What is recorded is not measured again, but for those that are named, whose rows stay until there are new ones.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    own = timing.label({"machine": timing.machine()})
    rows: list[Row] = [row for told in timing.load(NAME) if timing.label(told) == own for row in told["rows"]]
    old = [row for row in rows if row["method"] in again and row["tokens"] in lengths]
    answers = {name: row["found"] for name, row in json.loads(PATTERNS.read_text(encoding="utf-8"))["rows"].items()}

    def known(causal: bool) -> list[Row]:
        """What need not be measured, of layers of one kind."""
        return [row for row in _without(rows, old) if row["causal"] is causal]

    for n, causal in product(lengths, (True, False)):
        left = [
            (name, method)
            for name, method in mechanisms().items()
            if (name == FLOOR or _causal(method, answers.get(name, {})) is causal) and _left(name, n, known(causal))
        ]
        base = warmed(None, causal, n) if left else None
        for start in range(0, len(left), TOGETHER):
            some = dict(left[start : start + TOGETHER])
            made, new = _made(some, causal, n, known(causal), patience)
            if base is not None and made:
                new += asked(base, made, causal, n, rounds)
            cannot = {row["method"] for row in new if row.get("why", "").startswith(CANNOT)}
            gone = [
                row for row in rows if row["causal"] is causal
                and ((row["method"] in some and row["tokens"] == n) or (row["method"] in cannot and row in old))
            ]  # fmt: skip
            rows = _without(rows, gone) + new
            rows.sort(key=lambda row: int(row["tokens"]))  # who reads them goes by growing lengths
            timing.record(
                NAME, rows, baseline=BASE, inputs=f"random, one text or square image, {HEADS} heads of {WIDTH // HEADS}"
            )
    torch.set_num_threads(threads)


def _causal(method: Method, found: Mapping[str, str]) -> bool | None:
    """Whether a mechanism attends to the past of its own text, or to both sides; None: to neither."""
    if found.get("self, causal") == YES and "text" in method.subjects:
        return True
    return False if found.get("self") == YES else None


def _without(rows: list[Row], some: list[Row]) -> list[Row]:
    """The rows but for these very ones."""
    return [row for row in rows if not any(row is other for other in some)]


def _left(name: str, n: int, rows: list[Row]) -> bool:
    """Whether there is still to be measured, or foretold, what a mechanism takes at a length."""
    past = [row for row in rows if row["method"] == name and row["tokens"] <= n]
    cannot = any(row.get("why", "").startswith(CANNOT) for row in past)
    return not cannot and not any(row["tokens"] == n and "there" in row for row in past)


def _made(
    methods: Mapping[str, Method], causal: bool, n: int, past: list[Row], patience: float
) -> tuple[dict[str, Made], list[Row]]:
    """The layers that can be timed, and of the others why they are not."""
    made, others = dict[str, Made](), list[Row]()
    for name, method in methods.items():
        before = [row for row in past if row["method"] == name and row["tokens"] < n and "there" in row]
        last = max(before, key=lambda row: row["tokens"], default=None)
        foretold = last["and_back"][name]["seconds"] * (n / last["tokens"]) ** 2 if last else 0.0
        why = f"{foretold:.0f} s a step foretold"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for own in (type(method), lambda method=method: method) if foretold <= patience else ():
                try:  # by its own settings, or its example's
                    made[name] = warmed(own(), causal, n)
                    break
                except (HeedfulError, TypeError) as error:
                    why = f"{CANNOT}{str(error).splitlines()[0]}"
        if name not in made:
            print(name, n, why, flush=True)
            others.append({"method": name, "causal": causal, "tokens": n, "why": why})
    return made, others


def pays(rows: list[Row], what: str) -> dict[str, int | None]:
    """The fewest tokens from which on each is faster than softmax at every length that was tried; None: never."""
    found: dict[str, int | None] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        tried = [{"tokens": row["tokens"], "found": row[what]} for row in rows if row["method"] == name and what in row]
        if tried:
            found[name] = faster_from([{**row, "found": {name: row["found"][name]}} for row in tried])[name]
    return found
