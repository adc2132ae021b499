"""Typed records of a comparison, one JSON line each: written as they are made, read back after a kill, merged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from heedful.core.errors import StatisticError


@dataclass(frozen=True)
class Answered:
    """One contender's answer to one item of one task."""

    contender: str
    task: str
    seed: int
    number: int  # the item's place in the task's series
    score: float  # in the task's unit
    nats: float  # mean log-probability of what is right, a token
    chance: float | None  # what guessing scores on this item
    seconds: float
    active: bool  # whether the contender had changed anything by then
    labels: Mapping[str, float | str] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> tuple[Any, ...]:
        return self.contender, self.task, self.seed, self.number


@dataclass(frozen=True)
class Cost:
    """One measurement of what a contender costs on one prompt."""

    contender: str
    tokens: int  # of the prompt
    machine: str
    turn: int  # contenders take turns, and a ratio is taken to the unedited model in the same turn; 0 is the warm-up
    prefill: float  # seconds
    step: float  # seconds for one more token, the median
    peak: int | None  # bytes above the resting model while reading the prompt; of the warm-up alone
    cache: int  # bytes held after the prompt
    density: float | None  # pairs computed over those of a causal map, mean over layers; None where nobody narrows it
    backends: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        return self.contender, self.tokens, self.machine, self.turn


@dataclass(frozen=True)
class Refused:
    """A contender that cannot take a task, or cannot be measured, and why."""

    contender: str
    task: str  # COSTS where the longest prompt is none for it
    reason: str

    @property
    def key(self) -> tuple[Any, ...]:
        return self.contender, self.task


Record = Answered | Cost | Refused
KINDS: dict[str, type[Answered] | type[Cost] | type[Refused]] = {
    "answered": Answered,
    "cost": Cost,
    "refused": Refused,
}
FACTS = "facts"
SAME = ("weights", "dtype", "how")  # what two comparisons must share to be one
COSTS = "costs"  # stands for a task where a contender's costs cannot be measured
LOG = "records.jsonl"  # the file's name in a folder


def line(record: Record) -> str:
    """A record as one line."""
    return json.dumps({"record": type(record).__name__.lower(), **asdict(record)}, allow_nan=False)


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The facts and records of a file; a last line that a kill cut short is left out."""
    facts: dict[str, Any] = {}
    records: list[Record] = []
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    for number, one in enumerate(lines, 1):
        if not one.strip():
            continue
        try:
            found = json.loads(one)
            name = found.pop("record")
            if name == FACTS:
                facts = found
                continue
            kind = KINDS[name]
            known = {f.name for f in fields(kind)}
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k in known}
            records.append(kind(**values))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):  # no newline after it: it was being written when the run was killed
                break
            raise StatisticError(f"{path}, line {number}: no record of a comparison; remove the line") from error
    return facts, records


class Log:
    """A file of records that grows. Without a file, records are kept in memory alone."""

    def __init__(self, path: Path | None, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.facts = dict(facts)
        self.records: dict[tuple[Any, ...], Record] = {}
        self.found = 0  # records that an earlier call left
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._go_on(path)
        self._write(json.dumps({"record": FACTS, **self.facts}))

    def _go_on(self, path: Path) -> None:
        earlier, records = read(path)
        records = [r for r in records if not isinstance(r, Refused)]  # what refused them may be mended by now
        self.facts, records = merged([(earlier, records), (self.facts, ())])
        self.records = {(type(r), *r.key): r for r in records}
        self.found = len(self.records)
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):  # cut off the line that was being written
            kept = text[: text.rfind("\n") + 1]
            beside = path.with_name(path.name + ".part")
            beside.write_text(kept, encoding="utf-8")
            beside.replace(path)

    def _write(self, one: str) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(one + "\n")

    def has(self, kind: type[Record], *key: Any) -> bool:
        return (kind, *key) in self.records

    def add(self, record: Record) -> None:
        self._write(line(record))
        self.records[(type(record), *record.key)] = record


def merged(parts: Iterable[tuple[Mapping[str, Any], Iterable[Record]]]) -> tuple[dict[str, Any], list[Record]]:
    """Several comparisons of the same model as one; of two records of the same thing the later one stays."""
    facts: dict[str, Any] = {}
    records: dict[tuple[Any, ...], Record] = {}
    for more, found in parts:
        for name in SAME:
            if name in facts and facts[name] != more.get(name):
                told = f"{name} is {facts[name]!r} in one and {more.get(name)!r} in the other"
                raise StatisticError(
                    f"comparisons of unlike models or runs cannot be joined: {told}; name another folder"
                )
        for name, what in more.get("contenders", {}).items():
            if (other := facts.get("contenders", {}).get(name, what)) != what:
                raise StatisticError(
                    f"{name!r} is {other} in one and {what} in the other; give it another name or folder"
                )
        joined = {name: {**facts.get(name, {}), **more.get(name, {})} for name in ("contenders", "tasks")}
        facts = {**more, **facts, **joined}
        records |= {(type(r), *r.key): r for r in found}
    return facts, list(records.values())
