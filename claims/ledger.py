"""What a claim is, how it is measured over seeds, and what verdict the numbers give.

python -m claims.P025            measures one claim and writes claims/results/P025.json
python -m claims.ledger          measures what is not measured yet   [KEYS] [--again]
python -m claims.ledger --try    sees that each claim still runs, at its smallest, and writes nothing   [KEYS]
python -m claims.ledger --page   prints the page that the docs show
python -m claims.ledger --judge  renews verdicts and words of stored effects after the rule or a sentence changed
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from heedful.laboratory.differences import Difference

RESULTS = Path(__file__).parent / "results"
KEPT = Path(__file__).parent / ".lab" / "seeds"  # of a claim that was stopped: what was measured under the same code
FEWEST = 5  # seeds that a claim needs
WORDS = ("key", "method", "says", "paper_number", "setup", "effect", "strong")  # of a claim, which its record repeats
HOLDS, WEAKER, UNSEEN, REVERSED = "holds", "weaker", "not seen at this scale", "reversed at this scale"


@dataclass(frozen=True)
class Claim:
    """A paper's claim in our terms: `measure(seed)` gives an effect that is positive when the paper is right."""

    key: str  # the paper's id
    method: str  # class name
    says: str  # what the paper claims, in one sentence
    paper_number: str  # its own figure, as the paper has it, or 'none given'
    setup: str  # what we measure, on what, in one or two sentences
    effect: str  # name and unit of the effect, such that above zero means the paper's direction
    measure: Callable[[int], tuple[float, dict[str, float]]]  # seed -> effect, and the numbers behind it
    seeds: int = FEWEST
    strong: float = 0.0  # an effect below this, though above zero, is called 'weaker'


@dataclass(frozen=True)
class Record:
    """One committed result."""

    key: str
    method: str
    says: str
    paper_number: str
    setup: str
    effect: str
    effects: list[float]
    mean: float
    spread: float  # standard deviation over seeds
    strong: float  # the claim's bar for 'holds'
    verdict: str
    details: list[dict[str, float]]
    seconds: float
    date: str
    versions: dict[str, str]
    hardware: str


def verdict(effects: list[float], strong: float) -> str:
    """holds / weaker / not seen / reversed at this scale, by a two-sided t test at 5 % over seeds."""
    if len(effects) < 2:
        return UNSEEN
    found = Difference.of(effects)
    if found.low <= 0 <= found.high:
        return UNSEEN
    if found.mean < 0:
        return REVERSED
    return HOLDS if found.mean >= strong else WEAKER


def hardware() -> str:
    """The processor and how many of its cores may be used."""
    from heedful.facts import processor

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor()}, {cores} cores"


def run(claim: Claim) -> Record:
    """Measure a claim seed by seed and write the record, beside and then renamed; stopped, it goes on with the next."""
    import torch

    path = _kept_at(claim)
    kept = _kept(path)
    effects, details, seconds = [], [], 0.0
    for seed in range(claim.seeds):
        began = time.perf_counter()
        torch.manual_seed(seed)
        effect, numbers, before = kept[seed] if seed in kept else (*claim.measure(seed), 0.0)
        if not math.isfinite(effect):
            raise ValueError(f"{claim.key}, seed {seed}: the effect is {effect}, which decides nothing")
        took = before or time.perf_counter() - began
        if seed not in kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write("\n" + json.dumps([seed, effect, numbers, took]))
        effects.append(effect)
        details.append(numbers)
        seconds += took
        again = ", as measured before" if seed in kept else ""
        print(f"{claim.key} seed {seed}: {claim.effect} = {effect:+.4g}{again}  {numbers}", flush=True)
    record = Record(
        **words(claim), effects=effects, mean=statistics.fmean(effects),
        spread=statistics.stdev(effects) if len(effects) > 1 else 0.0,
        verdict=verdict(effects, claim.strong),
        details=details, seconds=round(seconds, 1), date=time.strftime("%Y-%m-%d"),
        versions=_versions(),
        hardware=hardware(),
    )  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    beside = RESULTS / f"{claim.key}.json.part"
    beside.write_text(json.dumps(asdict(record), indent=1) + "\n")
    beside.replace(RESULTS / f"{claim.key}.json")
    path.unlink(missing_ok=True)
    print(f"{claim.key}: {record.verdict} ({record.mean:+.4g} ± {record.spread:.2g} over {claim.seeds} seeds)")
    return record


def _kept_at(claim: Claim) -> Path:
    """Where the seeds of a claim are kept until all are measured, by all the code that may have a say in them."""
    import heedful

    home = Path(heedful.__file__).parent
    own = [file for file in home.rglob("*") if file.suffix in (".py", ".h", ".cpp")]
    files = [*_sources(Path(inspect.getfile(claim.measure))), *sorted(own)]
    told = [json.dumps(_versions()).encode(), *(file.read_bytes() for file in files)]
    code = hashlib.sha256(b"\0".join(told))
    return KEPT / f"{claim.key}-{code.hexdigest()[:16]}.jsonl"


def _sources(file: Path) -> list[Path]:
    """The file, and those beside this package's that it imports anywhere, and these in turn."""
    root, found, queue = Path(__file__).parents[1], set[Path](), [file]
    while queue:
        if (file := queue.pop()) in found:
            continue
        found.add(file)
        names = set[str]()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}", *(f"{node.module}.{each.name}" for each in node.names)}
            elif isinstance(node, ast.Import):
                names |= {each.name for each in node.names}
        paths = (root.joinpath(*name.split(".")).with_suffix(".py") for name in names)
        queue += [path for path in paths if path.is_file() and path != Path(__file__)]
    return sorted(found)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("heedful", "torch", "transformers")}


def _kept(path: Path) -> dict[int, tuple[float, dict[str, float], float]]:
    """By seed the effect, its numbers and the seconds that it took; a line cut short is none."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            seed, *rest = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[seed] = tuple(rest)
    return found


def claims() -> dict[str, Claim]:
    """Every claim in this folder, by key."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.stem not in ("__init__", "ledger") and not file.stem.startswith("_"):
            claim = importlib.import_module(f"claims.{file.stem}").CLAIM
            found[claim.key] = claim
    return found


def words(claim: Claim) -> dict[str, str | float]:
    """What a record says that was known before anything was measured."""
    return {name: getattr(claim, name) for name in WORDS}


def judge() -> None:
    """Give every stored record the verdict that its effects have under today's rule, and its claim's words."""
    for key, claim in claims().items():
        path = RESULTS / f"{key}.json"
        if path.exists():
            record = json.loads(path.read_text())
            record |= words(claim) | {"verdict": verdict(record["effects"], claim.strong)}
            path.write_text(json.dumps(record, indent=1) + "\n")


def try_out(chosen: dict[str, Claim]) -> None:
    """Run each claim at its smallest, and exit with what went wrong."""
    from claims._small import tried

    faults = 0
    for key, seconds, fault in tried(chosen):
        print(f"{key}: {fault or 'runs'}, {seconds:.1f} s", flush=True)
        faults += bool(fault)
    if faults:
        raise SystemExit(f"{faults} of {len(chosen)} claims no longer run")


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the claims of the ledger")
    parser.add_argument("keys", nargs="*", help="of claims, as in P228; none: all")
    parser.add_argument("--again", action="store_true", help="measure those that have a record too")
    parser.add_argument("--page", action="store_true", help="print the docs' page and measure nothing")
    parser.add_argument("--judge", action="store_true", help="renew verdicts and words, and measure nothing")
    parser.add_argument("--try", action="store_true", dest="tries", help="see that each still runs, and write nothing")
    asked = parser.parse_args()
    if asked.judge:
        judge()
        return
    if asked.page:
        from claims._page import page

        sys.stdout.write(page())
        return
    found = claims()
    if unknown := set(asked.keys) - found.keys():
        parser.error(f"no claim has the key {', '.join(sorted(unknown))}; P228 is one")
    chosen = {key: claim for key, claim in found.items() if key in (asked.keys or found)}
    if asked.tries:
        try_out(chosen)
        return
    for key, claim in chosen.items():
        if asked.again or not (RESULTS / f"{key}.json").exists():
            run(claim)


if __name__ == "__main__":
    main()
