"""`heedful.lab`: any number of mechanisms, each trained on the same tiny models, data and budget, beside softmax."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from heedful.catalogue import stack_from
from heedful.core.asked import asks
from heedful.core.errors import FieldError, HeedfulError, WriteError
from heedful.core.files import folder_for
from heedful.core.kinds.conversion import Progress, Report
from heedful.core.method import Method, Part, Scoped, Stack, as_stack
from heedful.core.ranges import PositiveInt
from heedful.laboratory.costs import PLAIN
from heedful.laboratory.course import Course
from heedful.laboratory.kinds import DEFAULTS, courses
from heedful.laboratory.outcome import Lab
from heedful.laboratory.records import Record, Trainings, name_of
from heedful.laboratory.results import Refused, facts
from heedful.laboratory.training import MissingTrainer, Steps, trial

Mechanism = Part | Stack | str


@asks
def lab(
    mechanisms: Mapping[str, Mechanism] | Iterable[Mechanism] | None = None,
    kind: str = "lm",
    *,
    seeds: PositiveInt = 3,
    tokens: int | None = None,
    out: str | Path | None = None,
    progress: Report | None = None,
) -> Lab:
    """Train softmax and each mechanism on the same tiny models, data and budget, and measure what comes of it.

    `mechanisms` are methods, stacks or their spelling, eight of the catalogue for None. `kind` is "lm" (bytes of text,
    synthetic tasks, and regression in context), "vit" (digits), "seq2seq" (strings), "pool" (bags of digits) or "sinks"
    (words over which softmax comes to park). `tokens` is the budget of each training, None for each course's own. `out`
    keeps what is trained: the same call goes on where it stopped, and other calls use what they share with it.
    """
    wanted = courses(kind, tokens)
    chosen = _chosen(mechanisms, kind)
    report = progress or (lambda _: None)
    kept = folder_for("lab()", out)
    with ExitStack() as stack:
        trainings = Trainings(kept or Path(stack.enter_context(tempfile.TemporaryDirectory())))
        todo = [(seed, name, course) for seed in range(seeds) for name in chosen for course in wanted]
        records: list[Record] = []
        refused = _refused(chosen, wanted, trainings)
        known = sum(trainings.has(course, chosen[name], seed) for seed, name, course in todo)
        note = f"goes on after {known} of {len(todo)} trainings" if known else ""
        total, done = sum(course.steps for _, _, course in todo), 0
        for one in refused.values():
            report(Progress("steps", 0, total, f"{one.mechanism} was refused by {one.course}: {one.reason}"))
        for seed, name, course in todo:
            report(Progress("steps", done, total, note))
            note = ""
            if (name, course.name) not in refused:
                if not trainings.has(course, chosen[name], seed):
                    report(Progress("steps", done, total, f"{course.name}, seed {seed}: {name}"))
                try:
                    made = trainings.record(course, chosen[name], seed, _counted(report, done, total))
                    records.append(made.named(name))
                except (WriteError, MissingTrainer):
                    raise
                except HeedfulError as reason:
                    refused[name, course.name] = Refused(name, course.name, str(reason))
                    note = f"{name} was refused by {course.name}: {reason}"
            done += course.steps
        report(Progress("steps", done, total, note))
    told = facts(records) | {"kind": kind, "contenders": {name: repr(what) for name, what in chosen.items() if what}}
    return Lab(told, wanted, tuple(records), tuple(refused.values()))


def _refused(
    chosen: Mapping[str, Stack], wanted: Iterable[Course], trainings: Trainings
) -> dict[tuple[str, str], Refused]:
    """What cannot be trained, found before anything is; an error where nothing is left beside softmax."""
    pairs = [(name, course) for name in chosen if name != PLAIN for course in wanted]
    found: dict[tuple[str, str], Refused] = {}
    for name, course in pairs:
        try:
            if not trainings.has(course, chosen[name], 0):
                trial(course, chosen[name])
        except HeedfulError as reason:
            found[name, course.name] = Refused(name, course.name, str(reason))
    if len(found) == len(pairs):
        told = "; ".join(dict.fromkeys(f"{x.mechanism}: {x.reason}" for x in found.values()))
        raise FieldError("lab()", "mechanisms", [*chosen][1:], f"cannot be trained here ({told})", "[MALA()]")
    return found


def _counted(report: Report, before: int, total: int) -> Steps:
    """Tells how far all trainings are from how far one is."""
    return lambda now: report(Progress("steps", before + now, total))


def _chosen(mechanisms: Mapping[str, Mechanism] | Iterable[Mechanism] | None, kind: str) -> dict[str, Stack]:
    """The mechanisms by name, softmax first."""
    found = {PLAIN: Stack()}
    mechanisms = DEFAULTS.get(kind, ()) if mechanisms is None else mechanisms
    items = mechanisms.items() if isinstance(mechanisms, Mapping) else ((None, one) for one in mechanisms)
    for given, one in items:
        what = stack_from(one, "lab()", "mechanisms") if isinstance(one, str) else one
        if not isinstance(what, Method | Scoped | Stack):
            raise FieldError("lab()", "mechanisms", what, "must be methods or stacks", "[ClippedSoftmax()]")
        stack = as_stack(what)
        name = name_of(stack) if given is None else given
        if name == PLAIN and len(stack):
            raise FieldError("lab()", "mechanisms", name, "is the name of softmax; choose another", "mine")
        if len(stack) and all(step.edit.reads and not step.edit.loss for step in stack.steps()):
            raise FieldError("lab()", "mechanisms", what, "only reads, so that it trains as softmax does", "MALA()")
        found[repr(stack) if name in found and len(stack) else name] = stack
    if len(found) < 2:
        raise FieldError("lab()", "mechanisms", (), "must name one or more beside softmax", "[ClippedSoftmax()]")
    return found
