"""`heedful.compare`: every contender and the unedited model on the same prompts, and what each costs."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from heedful.adapters.transformers import adapt
from heedful.adapters.wrapped import unwrapped
from heedful.api import still
from heedful.bench.answer import answer
from heedful.bench.comparison import PLAIN, Comparison
from heedful.bench.cost import WARM_UP, cost, machine
from heedful.bench.records import COSTS, Answered, Cost, Log, Refused
from heedful.core.asked import asks
from heedful.core.errors import FieldError, HeedfulError, SiteError, WriteError
from heedful.core.files import RECORDS, folder_for, held
from heedful.core.kinds import Decode, Prompt, Surgery, Tokens
from heedful.core.method import Method, Scoped, method_of
from heedful.core.stack import Stack
from heedful.diagnosis.texts import positions
from heedful.engine.select import named
from heedful.facts import facts_of, surroundings
from heedful.models import Loaded
from heedful.tasks.task import Item, Task
from heedful.text_models import Contender, TextModel, require_causal, text_model


@dataclass(frozen=True)
class Progress:
    """How far a comparison is."""

    stage: str  # "answers" or "costs"
    done: int  # answers, or turns
    total: int
    note: str = ""


Report = Callable[[Progress], None]


def label(what: Contender) -> str:
    """A contender's short name: the settings that differ from the defaults."""
    if isinstance(what, Stack):
        return " | ".join(label(part) for part in what) or PLAIN
    entry = method_of(what) if isinstance(what, Scoped) else what
    known = {f.name: f.default for f in fields(entry)}
    told = [f"{name}={_short(x)}" for name, x in vars(entry).items() if name in known and x != known[name]]
    name = type(entry).__name__ + (f"({', '.join(told)})" if told else "")
    return name + repr(what).removeprefix(repr(entry)) if isinstance(what, Scoped) else name


def _short(value: object) -> str:
    """A setting as a label has it: what a fit found is named by what it holds."""
    text = repr(value)
    return text if len(text) <= 60 else "#" + hashlib.sha256(text.encode()).hexdigest()[:6]


def _named(contenders: Mapping[str, Contender] | Iterable[Contender]) -> dict[str, Contender]:
    """Contenders by the names that the table shows."""
    if isinstance(contenders, Mapping):
        found = dict(contenders)
    else:
        found = {}
        for what in contenders:
            if not isinstance(what, Method | Scoped | Stack | Tokens | Decode | Surgery):
                rule = "must be methods, stacks, or steps on tokens, logits or weights"
                raise FieldError("compare()", "methods", what, rule, "SnapKV(0.25) | TempScale()")
            name = label(what)
            found[repr(what) if name in found else name] = what
    if PLAIN in found:
        raise FieldError("compare()", "methods", PLAIN, "is the name of the model as it is; choose another", "mine")
    if not found:
        raise FieldError("compare()", "methods", (), "must name one or more", "[SnapKV(0.25)]")
    return found


@asks
def compare(
    model: Loaded | tuple[Any, Any],
    methods: Mapping[str, Contender] | Iterable[Contender],
    tasks: Iterable[Task | str],
    *,
    count: int = 30,
    seed: int = 0,
    turns: int = 3,
    out: str | Path | None = None,
    progress: Report | None = None,
    **how: Any,
) -> Comparison:
    """How each method does on each task, against the unedited model on the same prompts, and what it costs.

    `model` is what `heedful.models` loads, or a model and its tokenizer. `count` is how many prompts of each task are
    asked. Costs are measured on the longest prompt, `turns` times in turn with the unedited model (0: not at all).
    `out` is a folder: records are written there as they are made, and the same call goes on where it stopped. `how`
    goes to `attach`.
    """
    given = model if isinstance(model, Loaded) else Loaded(unwrapped(model[0]), model[1], "")
    if given.tokenizer is None:
        raise FieldError("compare()", "model", given.name, "has no tokenizer, which tasks need", "(model, tokenizer)")
    contenders, folder = _named(methods), None if out is None else folder_for("compare()", out, "out")
    chosen = [_task(task) for task in tasks]
    require(given, chosen, count, turns, how)
    facts = facts_of(given.model, given.name, len(adapt(given.model, how.get("only")).layer_names))
    facts |= surroundings(next(given.model.parameters()).device)
    facts["how"] = {name: repr(value) for name, value in sorted(how.items()) if value not in (None, "auto")}
    facts["contenders"] = {name: repr(what) for name, what in contenders.items()}
    facts["tasks"] = {repr(task): _about(task) for task in chosen}
    with still(given.model), held(folder, "a comparison"):
        log = Log(None if folder is None else folder / RECORDS, facts, seed)
        job = _Job(given.model, contenders, how, log, progress or (lambda _: None))
        items = {task: _fitting(given.model, task, given.tokenizer, count, seed) for task in chosen}
        job.answers(items, seed)
        if turns:
            longest = max((item for made in items.values() for item in made), key=lambda item: len(item.prompt))
            job.costs(longest.prompt, turns)
        return Comparison(log.facts, tuple(log.records.values()))


def _task(task: Task | str) -> Task:
    if isinstance(task, Task):
        return task
    if not isinstance(task, str):
        raise FieldError("compare()", "tasks", task, "must be tasks or their names", ["needle"])
    from heedful.tasks import find

    return find(task)


def _about(task: Task) -> dict[str, Any]:
    return {"name": task.name, "about": task.about, "unit": task.unit, "more_is_better": task.more_is_better}


def require(given: Loaded, tasks: Sequence[Task], count: int, turns: int, how: Mapping[str, Any]) -> None:
    """Refuse what no comparison can be made of, before anything takes time."""
    if count < 2:
        raise FieldError("compare()", "count", count, "must be 2 or more prompts a task", 30)
    if turns < 0:
        raise FieldError("compare()", "turns", turns, "must be 0 or more", 3)
    if not tasks:
        raise FieldError("compare()", "tasks", (), "must name one or more", "['needle']")
    named(how.get("backend", "auto"), "compare()")
    require_causal(given.model)
    adapt(given.model, how.get("only"))


def _require_role(what: Contender | None, prompt: Prompt) -> None:
    """Refuse a method that looks for spans of a name that the prompt does not mark; say which it does."""
    for part in what if isinstance(what, Stack) else [what]:
        method = method_of(part) if isinstance(part, Scoped) else part
        role = getattr(method, "role", None)
        if isinstance(role, str) and role not in prompt.roles:
            marked = (
                f"they mark {', '.join(map(repr, prompt.roles))}" if prompt.roles else "they mark none; try the needle"
            )
            rule = f"no span in these prompts has that name; {marked}"
            raise FieldError(method, "role", role, rule, next(iter(prompt.roles), "needle"))


def _fitting(model: Any, task: Task, words: Any, count: int, seed: int) -> Sequence[Item]:
    """A task's items, none of them longer than the model takes."""
    items = task.items(words, count, seed)
    limit = positions(model)
    longest = max(len(item.prompt) + max(map(len, item.options), default=0) for item in items)
    if limit is not None and longest > limit:
        rule = f"makes prompts of {longest} tokens, and {type(model).__name__} has {limit} positions"
        raise FieldError("compare()", "tasks", repr(task), rule, "a shorter one")
    return items


@dataclass(eq=False)
class _Job:
    """One comparison under way."""

    model: Any
    contenders: dict[str, Contender]
    how: dict[str, Any]
    log: Log
    report: Report

    def everyone(self) -> list[tuple[str, Contender | None]]:
        """The model as it is, then each contender."""
        return [(PLAIN, None), *self.contenders.items()]

    def answers(self, items: Mapping[Task, Sequence[Item]], seed: int) -> None:
        total = (len(self.contenders) + 1) * sum(map(len, items.values()))
        done = 0
        if self.log.found:
            self.report(Progress("answers", done, total, f"goes on after {self.log.found} records made before"))
        for name, what in self.everyone():
            for task, made in items.items():
                todo = [n for n in range(len(made)) if not self.log.has(Answered, name, repr(task), seed, n)]
                done += len(made) - len(todo)
                try:
                    if todo:
                        _require_role(what, made[todo[0]].prompt)
                        with text_model(
                            self.model, what, **self.how
                        ) as speaker:  # a new one: what it did before is past
                            for n in todo:
                                self.log.add(_answered(speaker, name, task, made[n], seed, n))
                                done += 1
                                self.report(Progress("answers", done, total))
                except WriteError:
                    raise
                except HeedfulError as reason:
                    self.log.add(Refused(name, repr(task), str(reason)))
                    self.report(Progress("answers", done, total, f"{name} on {task.name}: {reason}"))

    def costs(self, prompt: Prompt, turns: int) -> None:
        everyone = self.everyone()
        here = machine(next(self.model.parameters()).device)
        total, done = len(everyone) * (turns + 1), 0
        for turn in range(WARM_UP, turns + 1):
            measured = (name for name, _ in everyone if not self.log.has(Refused, name, COSTS))
            fresh = not all(self.log.has(Cost, name, len(prompt), here, turn) for name in measured)
            for name, what in everyone:  # a turn that a kill cut short is measured anew: its baseline is another's
                done += 1
                note = ""
                if fresh and not self.log.has(Refused, name, COSTS):
                    try:
                        _require_role(what, prompt)
                        self.log.add(cost(self.model, what, name, prompt, turn, **self.how))
                    except WriteError:
                        raise
                    except HeedfulError as reason:
                        self.log.add(Refused(name, COSTS, str(reason)))
                        note = f"costs of {name}: {reason}"
                self.report(Progress("costs", done, total, note))


def _answered(speaker: TextModel, name: str, task: Task, item: Item, seed: int, n: int) -> Answered:
    """One contender's answer to one item."""
    began = time.perf_counter()
    sheet = answer(speaker, item)
    score, nats, seconds = task.score(item, sheet), task.nats(item, sheet), time.perf_counter() - began
    if not (math.isfinite(score) and math.isfinite(nats)):
        raise SiteError(
            f"prompt {n}: the log-probability of what is right is {nats}, which can be compared with nothing"
        )
    return Answered(
        name, repr(task), seed, n, score, nats, task.chance(item), seconds, speaker.active, dict(item.labels)
    )
