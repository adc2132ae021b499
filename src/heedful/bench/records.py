"""Typed records of a comparison, one JSON line each: written as they are made, read back after a kill, merged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from heedful.core.errors import StatisticError
from heedful.core.files import append, replace_text, writing


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
    reason: str = ""  # why it had not, where that is known

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
    step: float | None  # seconds for one more token, the median; None where none follows
    peak: int | None  # bytes above the resting model while reading the prompt; of the warm-up alone
    cache: int  # bytes held after the prompt
    density: float | None  # pairs computed over those of a causal map, mean over layers; None where nobody narrows it
    backends: tuple[str, ...] = ()
    batch: int = 1  # rows that were read side by side, all of the same prompt

    @property
    def key(self) -> tuple[Any, ...]:
        return self.contender, self.tokens, self.machine, self.turn, self.batch


@dataclass(frozen=True)
class Refused:
    """A contender that cannot take a task, or cannot be measured, and why."""

    contender: str
    task: str  # `costs_at` a batch where it cannot take the longest prompt so
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
LATEST = ("margin", "batch", "cache")  # how records are read: the last call's holds
ABOUT = {"name": str, "about": str, "unit": str, "more_is_better": bool}  # what is told of a task
LARGEST = 2.0**63  # no number of a record reaches it


def costs_at(batch: int) -> str:
    """What stands for a task where a contender's costs cannot be measured."""
    return "costs" if batch == 1 else f"costs at batch {batch}"


def line(record: Record) -> str:
    """A record as one line."""
    return json.dumps({"record": type(record).__name__.lower(), **asdict(record)}, allow_nan=False)


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The facts and records of a file; a last line that a kill cut short is left out."""
    facts, records, _ = _parsed(path)
    return facts, records


def _parsed(path: Path) -> tuple[dict[str, Any], list[Record], str]:
    """Facts, records, and the text of the lines that hold them."""
    facts: dict[str, Any] = {}
    records: list[Record] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StatisticError(f"cannot read {path}: {reason}; name a file of records, or its folder") from error
    whole = []
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            one = raw.decode()
            found = _object(one)
            if (name := found.pop("record")) == FACTS:
                facts = _checked_facts(found)
            else:
                records.append(_record(KINDS[name], found))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines):  # no newline after it: it was being written when the run was killed
                break
            raise StatisticError(
                f"{path}, line {number}: no record of a comparison ({error}); remove the line"
            ) from error
        whole.append(one + "\n")
    return facts, records, "".join(whole)


def _object(text: str) -> dict[str, Any]:
    """What a line says; NaN and infinity are no numbers."""

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no number")

    found = json.loads(text, parse_constant=refuse)
    if not isinstance(found, dict):
        raise TypeError("it holds no object")
    return found


def _record(kind: type[Record], found: Mapping[str, Any]) -> Record:
    """A record whose values are of their kinds."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k in hints}
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise TypeError(f"{name} is {value!r}, and must be {hints[name]}")
    record = kind(**values)
    if isinstance(record, Cost) and min(_sizes(record)) <= 0:
        raise ValueError("times, tokens and batch must be above 0")
    return record


def _sizes(cost: Cost) -> list[float]:
    return [x for x in (cost.prefill, cost.step, cost.tokens, cost.batch) if x is not None]


def _fits(value: object, hint: Any) -> bool:
    """Whether a value read from a file is of the kind that a field holds."""
    parts = get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(x, parts[0]) for x in value)
    if get_origin(hint) is Mapping:
        return isinstance(value, dict) and all(_fits(x, parts[1]) for x in value.values())
    if parts:  # one of several
        return any(_fits(value, part) for part in parts)
    if hint is float:
        return type(value) in (int, float) and abs(value) < LARGEST  # type: ignore[arg-type]  # false for NaN
    return type(value) is hint and (hint is not int or abs(value) < LARGEST)  # type: ignore[arg-type]


def _checked_facts(found: dict[str, Any]) -> dict[str, Any]:
    """The facts, where those that are read again say what they must."""
    contenders, code, tasks = (found.get(name, {}) for name in ("contenders", "code", "tasks"))
    if not (_fits(margin := found.get("margin", 1.0), float) and margin > 0):
        raise TypeError(f"margin is {margin!r}, and must be a number above 0")
    if not _fits(found.get("cache"), int | None):
        raise TypeError(f"cache is {found['cache']!r}, and must be a number of bytes")
    if not (isinstance(batch := found.get("batch", [1]), list) and batch and all(_fits(x, int) for x in batch)):
        raise TypeError(f"batch is {batch!r}, and must be a list of sizes")
    if not (isinstance(contenders, dict) and all(isinstance(x, str) for x in contenders.values())):
        raise TypeError("contenders must be what each name stands for")
    if not (isinstance(code, dict) and all(isinstance(x, str) for x in code.values())):
        raise TypeError("code must be the name of each contender's and task's code")
    for task, about in tasks.items() if isinstance(tasks, dict) else [("tasks", tasks)]:
        if not isinstance(about, dict) or any(type(about.get(name)) is not kind for name, kind in ABOUT.items()):
            raise TypeError(f"{task} must have {', '.join(ABOUT)}")
        for name, what in (("left_out", "left out"), ("told", "told")):
            if not (isinstance(out := about.get(name, []), list) and all(isinstance(x, str) for x in out)):
                raise TypeError(f"what {task} {what} must be a list of sentences")
    return found


class Log:
    """A file of records that grows. Without a file, records are kept in memory alone."""

    def __init__(self, path: Path | None, facts: Mapping[str, Any], seed: int) -> None:
        self.path = path
        self.facts = dict(facts)
        self.records: dict[tuple[Any, ...], Record] = {}
        self.found = 0  # records that an earlier call left
        if path is None:
            return
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._go_on(path, seed)
        self._write(json.dumps({"record": FACTS, **self.facts}))

    def _go_on(self, path: Path, seed: int) -> None:
        earlier, records, whole = _parsed(path)
        if other := {r.seed for r in records if isinstance(r, Answered)} - {seed}:
            raise StatisticError(
                f"{path.parent} holds answers to the prompts that seed {min(other)} draws, and this call's seed is "
                f"{seed}: name another folder; Comparison.load(one, other) joins them"
            )
        records = [r for r in records if not isinstance(r, Refused)]  # what refused them may be mended by now
        self.facts, records = merged([(earlier, records), (self.facts, ())])
        self.records = {(type(r), *r.key): r for r in records}
        self.found = len(self.records)
        with writing(path):
            if path.read_bytes() != whole.encode():  # cut off the line that was being written, or end it
                replace_text(path, whole)

    def _write(self, one: str) -> None:
        if self.path is not None:
            append(self.path, one + "\n")

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
        for name, code in more.get("code", {}).items():
            if facts.get("code", {}).get(name, code) != code:
                raise StatisticError(
                    f"answers of {name!r} are from before and from after its code was changed: name another folder, or "
                    "remove the older one"
                )
        joined = {name: {**facts.get(name, {}), **more.get(name, {})} for name in ("contenders", "tasks", "code")}
        facts = {**more, **facts, **joined, **{name: more[name] for name in LATEST if name in more}}
        records |= {(type(r), *r.key): r for r in found}
    return facts, list(records.values())
