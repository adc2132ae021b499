"""`heedful.compare`: every contender and the unedited model on the same prompts, and what each costs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from heedful.adapters.choosing import adapter_for
from heedful.adapters.wrapped import device_of, inside
from heedful.api import attach, still
from heedful.bench.asking import Asked, Asker, going_on, require_fit
from heedful.bench.comparison import Comparison
from heedful.bench.cost import WARM_UP, cost, machine
from heedful.bench.intervals import LEAST
from heedful.bench.numbers import size_from
from heedful.bench.records import Answered, Cost, Log, Refused, costs_at
from heedful.bench.results import MARGIN, PLAIN
from heedful.catalogue import stack_from
from heedful.core.asked import asks, require_passed
from heedful.core.code import code_of
from heedful.core.errors import Code, FieldError, HeedfulError, RefusedModel, WriteError
from heedful.core.figures import a_few, counted
from heedful.core.files import RECORDS, folder_for, held
from heedful.core.kinds.conversion import Progress, Report
from heedful.core.kinds.decode import Decode
from heedful.core.kinds.tokens import Tokens
from heedful.core.kinds.weights import Surgery
from heedful.core.method import Method, Scoped, Stack, method_of
from heedful.core.values import replace
from heedful.diagnosis.texts import positions
from heedful.diagnosis.workers import Workers, as_workers
from heedful.engine.memory import enough_memory
from heedful.engine.select import backend_named
from heedful.facts import facts_of, surroundings
from heedful.models import Loaded
from heedful.tasks.task import Item, Task
from heedful.text_models import Contender

PROMPTS, MINUTES = 300, 10.0  # of each task at most, and of asking


def label(what: Contender) -> str:
    """A contender's short name: the settings that differ from the defaults."""
    if isinstance(what, Stack):
        return " | ".join(label(part) for part in what) or PLAIN
    entry: Any = method_of(what)
    known = {f.name: f.default for f in fields(entry)}
    told = [f"{name}={_short(x)}" for name, x in vars(entry).items() if name in known and x != known[name]]
    name = type(entry).__name__ + (f"({', '.join(told)})" if told else "")
    return name + repr(what).removeprefix(repr(entry)) if isinstance(what, Scoped) else name


def _read(what: Any) -> Any:
    return stack_from(what) if isinstance(what, str) else what


def _short(value: object) -> str:
    """A setting as a label has it: what a fit found is named by what it holds."""
    text = repr(value)
    return text if len(text) <= 60 else "#" + hashlib.sha256(text.encode()).hexdigest()[:6]


def _named(contenders: Mapping[str, Contender | str] | Iterable[Contender | str]) -> dict[str, Contender]:
    """Contenders by the names that the table shows; those that are text are read as on the command line."""
    found: dict[str, Contender] = {}
    if isinstance(contenders, Mapping):
        found = {name: _read(what) for name, what in contenders.items()}
    else:
        for given in contenders:
            what = _read(given)
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


def require_reader(model: Loaded, owner: str, field: str, good: object) -> None:
    """Refuse a model without what turns prompts into its inputs."""
    if model.tokenizer is None:
        raise FieldError(owner, field, model.name, "has no tokenizer or processor, which tasks need", good)


@asks
def compare(  # noqa: PLR0913 - what a user may set, each by name
    model: Loaded | tuple[Any, Any],
    methods: Mapping[str, Contender | str] | Iterable[Contender | str],
    tasks: Iterable[Task | str | Path],
    *,
    prompts: int = PROMPTS,
    minutes: float = MINUTES,
    margin: float = MARGIN,
    seed: int = 0,
    turns: int = 3,
    batch: int | Sequence[int] = 1,
    cache: int | str | None = None,
    out: str | Path | None = None,
    workers: int | Workers | None = None,
    progress: Report | None = None,
    **how: Any,
) -> Comparison:
    """How each method does on each task, against the unedited model on the same prompts, and what it costs.

    `model` is what `heedful.models` loads, or a model and its tokenizer or processor. A method is a value or, as on the
    command line, its spelling: "snapkv(budget=0.25)|tempscale". A task is a `Task`, its name, or a file or folder of
    your own. Every method is asked thirty prompts of each task, then more until its verdict is known (surely better,
    surely worse, or surely no worse than by `margin`), and at most `prompts` of each task; `minutes` is how long is
    asked in one call. Costs are measured afterwards on the longest of the first thirty prompts, `turns` times in turn
    with the unedited model (0: not at all), on `batch` rows of it, or on each of several such sizes; what fits and
    holds is named where `cache`, as in "4GB", says how much a batch's cache may take. `out` is a folder: records are
    written there as they are made, and the same call goes on where it stopped. `workers` share the questions, as many
    as are asked for, or `Ray` or `Ranks` as these are set; costs are measured here. `how` goes to `attach`.
    """
    given = model if isinstance(model, Loaded) else Loaded(inside(model[0]), model[1], "")
    require_reader(given, "compare()", "model", Code("(model, tokenizer)"))
    contenders, folder = _named(methods), folder_for("compare()", out)
    batches, limit = costed(batch, cache, turns)
    chosen = [_task(task) for task in tasks]
    require(given, chosen, prompts, minutes, margin, turns, how)
    with still(given.model):
        chosen = [task.on(given.model, given.tokenizer) for task in chosen]
        adapter = adapter_for(given.model, how.get("only"), how.get("inputs"))
        for task in chosen:
            if not adapter.ready and (once := task.inputs(given.model, given.tokenizer)) is not None:
                adapter.look(once)
    facts = facts_of(given.model, given.name, len(adapter.layer_names)) | surroundings(device_of(given.model))
    facts |= {"margin": margin, "batch": batches, "cache": limit}
    facts["how"] = {name: repr(value) for name, value in sorted(how.items()) if value not in (None, "auto")}
    facts["contenders"] = {name: repr(what) for name, what in contenders.items()}
    facts["code"] = {name: code_of(what) for name, what in contenders.items()}
    series = [Series(task, given.model, given.tokenizer, seed, prompts) for task in chosen]
    facts["tasks"] = {made.name: _about(made.task) | {"left_out": made.left_out} for made in series}
    facts["code"] |= {made.name: code_of(made.task) for made in series}
    readers, asker = as_workers(workers, given.model, "compare()"), Asker(given.model, how, time.time() + 60 * minutes)

    def whole() -> Comparison:
        with held(folder, "a comparison"):
            log = Log(None if folder is None else folder / RECORDS, facts, seed)
            job = _Job(asker, contenders, readers, log, progress or (lambda _: None))
            job.answers(series, minutes)
            if turns:
                early = [item for made in series for item in made.first(LEAST).values()]
                longest = max(early, key=lambda item: item.read)
                for rows in batches:
                    job.costs(job.asked(series), longest, turns, rows)
            return Comparison(log.facts, tuple(log.records.values()))

    with still(given.model):
        found: Comparison = readers.together(whole, asker)
        return found


def costed(batch: int | Sequence[int], cache: int | str | None, turns: int) -> tuple[list[int], int | None]:
    """The batches of which costs are measured, and how many bytes of cache are allowed."""
    batches = list(dict.fromkeys([batch] if isinstance(batch, int) else batch))
    if not batches or min(batches) < 1:
        raise FieldError("compare()", "batch", batch, "must be 1 or more, or several such sizes", (1, 4, 16))
    if cache is not None and not turns:
        raise FieldError("compare()", "turns", turns, "measures no cache, and one is limited", 1)
    return batches, None if cache is None else size_from(cache)


def _task(task: Task | str | Path) -> Task:
    if isinstance(task, Task):
        return task
    if not isinstance(task, str | Path):
        raise FieldError("compare()", "tasks", task, "must be tasks, their names, or files of items", ["needle"])
    from heedful.tasks import find, from_file, named_as

    with named_as("compare()", "tasks"):
        return from_file(task) if isinstance(task, Path) else find(task)


def _about(task: Task) -> dict[str, Any]:
    about = {"name": task.title, "about": task.about, "unit": task.unit, "more_is_better": task.more_is_better}
    return about | ({"told": list(task.told)} if task.told else {})


def require(
    given: Loaded,
    tasks: Sequence[Task],
    prompts: int,
    minutes: float,
    margin: float,
    turns: int,
    how: Mapping[str, Any],
) -> None:
    """Refuse what no comparison can be made of, before anything takes time."""
    require_passed("compare()", how, compare, attach)
    require_counts(prompts, minutes, margin, turns, how.get("backend", "auto"))
    if not tasks:
        raise FieldError("compare()", "tasks", (), "must name one or more", "['needle']")
    for task in tasks:
        _require_taken(task, given)
    adapter_for(given.model, how.get("only"))


def _require_taken(task: Task, given: Loaded) -> None:
    """Refuse a model that cannot be asked this, with the tasks of ours that it can be asked."""
    from heedful.tasks import known

    try:
        task.require(given.model, given.tokenizer)
    except RefusedModel as reason:
        takes = [name for name, kind in known().items() if _is_taken(kind(), given)]
        raise RefusedModel(f"{reason}. It can be asked --tasks {','.join(takes)}" if takes else str(reason)) from reason


def _is_taken(task: Task, given: Loaded) -> bool:
    try:
        task.require(given.model, given.tokenizer)
    except RefusedModel:
        return False
    return True


def require_counts(prompts: int, minutes: float, margin: float, turns: int, backend: str) -> None:
    """Refuse what is wrong whatever the model is."""
    if prompts < 2:
        raise FieldError("compare()", "prompts", prompts, "must be 2 or more of each task", PROMPTS)
    if not minutes > 0:
        raise FieldError("compare()", "minutes", minutes, "must be above 0", MINUTES)
    if not 0 < margin < 1:
        raise FieldError("compare()", "margin", margin, "must lie between 0 and 1", MARGIN)
    if turns < 0:
        raise FieldError("compare()", "turns", turns, "must be 0 or more", 3)
    backend_named(backend, "compare()")


def fits(given: Loaded, task: Task) -> bool:
    """Whether the model takes the task's prompts, as far as the first one tells."""
    limit = positions(given.model)
    return limit is None or (task.planned <= limit and task.item(given.tokenizer, 0, 0).size <= limit)


class Series:
    """The items of one task, made as they are asked for, none longer than the model takes.

    A task of the user's own goes without its longer items; of others none is left out, since all would be alike.
    """

    def __init__(self, task: Task, model: Any, tokenizer: Any, seed: int, prompts: int) -> None:
        self.task, self.name, self.seed = task, repr(task), seed
        self._model, self._tokenizer, self._limit = model, tokenizer, positions(model)
        self._made: dict[int, Item] = {}
        self._tried = 0
        known = task.available(tokenizer)
        if self._limit is not None and task.planned > self._limit:
            raise self._too_long(task.planned, self._limit)  # before it is made
        self.prompts = prompts if known is None else min(prompts, known)
        self.left_out = list(getattr(task, "left_out", ()))
        if known is not None:
            if out := self.prompts - len(self.first(self.prompts)):
                self.left_out.append(f"{out} longer than the {self._limit} positions of {type(model).__name__}")
            if not self._made:
                raise FieldError("compare()", "tasks", self.name, self.left_out[-1], "shorter items")

    def first(self, count: int) -> dict[int, Item]:
        """The items at the first so many places, or all that may be asked, by their place."""
        for number in range(self._tried, min(count, self.prompts)):
            self._tried = number + 1
            item = self.task.item(self._tokenizer, number, self.seed)
            limit = None if item.shown.reads == "image" else self._limit  # the words' own, where a model has such
            if limit is None or item.size <= limit:
                self._made[number] = item
            elif self.task.available(self._tokenizer) is None:
                raise self._too_long(item.size, limit)
        return {number: item for number, item in self._made.items() if number < count}

    def _too_long(self, size: int, limit: int) -> FieldError:
        rule = f"makes prompts of {size} tokens, and {type(self._model).__name__} has {limit} positions"
        length = getattr(self.task, "length", 0) * limit // size * 9 // 10
        good = [replace(self.task, length=length)] if length else ["loss"]
        return FieldError("compare()", "tasks", self.name, rule, good)


def further(prompts: int) -> int:
    """How many prompts the next look takes: ten more at first, then a third more."""
    return prompts + max(10, prompts // 30 * 10)


@dataclass(eq=False)
class _Job:
    """One comparison under way."""

    asker: Asker
    contenders: dict[str, Contender]
    workers: Workers
    log: Log
    report: Report
    done: int = 0

    def everyone(self) -> list[tuple[str, Contender | None]]:
        """The model as it is, then each contender."""
        return [(PLAIN, None), *self.contenders.items()]

    def asked(self, tasks: Sequence[Series]) -> list[tuple[str, Contender | None]]:
        """All of these but whoever every task has refused."""
        return [
            (name, what)
            for name, what in self.everyone()
            if not all(self.log.has(Refused, name, task.name) for task in tasks)
        ]

    def answers(self, tasks: Sequence[Series], minutes: float) -> None:
        """Ask everyone a few prompts of each task, and more of those of whom the verdict is not known."""
        if self.log.found:
            self.report(Progress("answers", 0, 1, f"goes on after {self.log.found} records made before"))
        for task in tasks:
            if out := task.left_out:
                note = f"{task.task.title}: {len(out)} left out: {a_few(out)}"
                self.report(Progress("answers", 0, 1, note))
        count, open_ = 0, {(task.name, name) for task in tasks for name, _ in self.everyone()}
        while open_ and count < max(task.prompts for task in tasks):
            count = further(count)
            if not self._round(tasks, open_, count):
                self.report(Progress("answers", self.done, self.done, f"the {minutes:g} minutes are over"))
                break
            if not self.asked(tasks)[1:]:
                self.report(Progress("answers", self.done, self.done, "every method was refused, on every task"))
                break
            if count >= LEAST:
                open_ = self._undecided(tasks, count)

    def _undecided(self, tasks: Sequence[Series], count: int) -> set[tuple[str, str]]:
        """Task and contender still to be asked, the unedited model where anybody is."""
        found = Comparison(self.log.facts, tuple(self.log.records.values()))
        left = {task.name for task in tasks if task.prompts > count}
        open_ = {key for key in found.open if key[0] in left and key[1] in self.contenders}
        names = [name for name in self.contenders if any(key[1] == name for key in open_)]
        what = f"undecided: {', '.join(names)}" if names else "every verdict is known, or nothing is left to ask"
        asked = min(count, max(task.prompts for task in tasks))
        self.report(Progress("answers", self.done, self.done, f"after {asked} prompts a task, {what}"))
        return open_ | {(task, PLAIN) for task, _ in open_}

    def _round(self, tasks: Sequence[Series], open_: set[tuple[str, str]], count: int) -> bool:
        """Ask up to so many prompts of each task; whether there was time for it."""
        work = []
        for name, what in self.everyone():
            for task in tasks:
                if (task.name, name) in open_ and not self.log.has(Refused, name, task.name):
                    items = {
                        n: item for n, item in task.first(count).items()
                        if not self.log.has(Answered, name, task.name, task.seed, n)
                    }  # fmt: skip
                    work += [Asked(name, what, task.task, task.seed, items)] if items else []
        total, over = self.done + sum(len(asked.items) for asked in work), False
        with closing(self.workers.each(self.asker, work)) as found:
            for asked, records in zip(work, found, strict=True):
                left = len(asked.items)
                for record in records:
                    self.log.add(record)
                    if isinstance(record, Refused):
                        total, left = total - left, 0
                        note = f"{asked.name} on {asked.task.title}: {record.reason}"
                    else:
                        self.done, left, note = self.done + 1, left - 1, ""
                    self.report(Progress("answers", self.done, total, note))
                over = over or left > 0
        return not over

    def costs(self, everyone: Sequence[tuple[str, Contender | None]], item: Item, turns: int, rows: int) -> None:
        model, how = self.asker.model, self.asker.how
        here = machine(device_of(model))
        total, done, costs = len(everyone) * (turns + 1), 0, costs_at(rows)
        for turn in range(WARM_UP, turns + 1):
            measured = (name for name, _ in everyone if not self.log.has(Refused, name, costs))
            fresh = not all(self.log.has(Cost, name, item.read, here, turn, rows) for name in measured)
            for name, what in everyone:  # a turn that a kill cut short is measured anew: its baseline is another's
                done += 1
                note = ""
                if fresh and not self.log.has(Refused, name, costs):
                    try:
                        require_fit(what, item)
                        size = f"{counted(rows, 'row')} of {item.read} tokens"
                        less = rows // 2 or "a task of shorter prompts"
                        with enough_memory("compare()", "batch", rows, size, less), going_on(model, what, item):
                            found = cost(model, what, name, item, turn, rows, **how)
                        self.log.add(found)
                    except WriteError:
                        raise
                    except HeedfulError as reason:
                        self.log.add(Refused(name, costs, str(reason)))
                        note = f"{costs} of {name}: {reason}"
                self.report(Progress("costs", done, total, note))
