"""One training, one record: written when all of it is known, and found again by what it was made of."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from heedful.bench.compare import label
from heedful.core.code import sources
from heedful.core.errors import StatisticError
from heedful.core.files import digest_of, placed, replace_text, sealed, writing
from heedful.core.fitted import Fitted
from heedful.core.method import Method, Part, Stack, as_stack
from heedful.core.spelling import spelled
from heedful.engine.run import Run
from heedful.facts import surroundings
from heedful.laboratory import costs, training
from heedful.laboratory.course import Course
from heedful.laboratory.training import Steps, opened, train

ENDING = ".training.json"
FOLLOWED = ("heedful.laboratory.", "heedful.kit.", "heedful.methods.")  # whose code counts wherever it is used


@dataclass(frozen=True)
class Record:
    """What one training gave."""

    key: str  # names all that settles the outcome
    course: str
    settings: dict[str, Any]
    mechanism: str
    seed: int
    numbers: dict[str, float]  # each of the course's quantities that could be measured, and costs
    losses: list[float]  # of each training step
    norms: list[float]  # of each step's gradient, before it is clipped
    parameters: int
    learned: int  # parameters of these that the mechanism brought
    active: bool  # whether it changed anything where it was measured
    seconds: float  # of training
    costs: dict[str, Any]  # plain numbers behind the ratios
    facts: dict[str, Any]  # machine and versions
    weights: str  # the checksum of what was trained

    def named(self, name: str) -> Record:
        """The same under another name for its mechanism."""
        return replace(self, mechanism=name)

    def __getitem__(self, name: str) -> float:
        if name not in self.numbers:
            known = ", ".join(self.numbers)
            raise StatisticError(f"{self.mechanism} has no {name!r} in the course {self.course!r}; it has {known}")
        return self.numbers[name]


def name_of(what: Stack) -> str:
    """What tables call it."""
    return label(what) if len(what) else costs.PLAIN


def _sources(course: Course, what: Stack) -> list[str]:
    """The text of every file that says what is trained and how, but for the core's and the engine's."""
    kinds = [type(course), *(type(method) for method in what.methods)]
    names = [training.__name__, *(base.__module__ for kind in kinds for base in kind.__mro__)]
    names = [name for name in names if not name.startswith("heedful.core.") and name not in ("builtins", "abc")]
    return sources(names, FOLLOWED)


def key(course: Course, what: Stack, seed: int) -> str:
    """A name for the outcome: the same settings and the same code have the same."""
    told = {
        "course": course.name,
        "settings": asdict(course),
        "what": [spelled(part) for part in what],
        "seed": seed,
        "sources": _sources(course, what),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


class Trainings:
    """A folder of trainings. What is there already is not made again; several processes may share one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def _path(self, course: Course, what: Stack, seed: int) -> Path:
        plain = re.sub(r"\W+", "-", name_of(what)).strip("-")[:60]
        return self.folder / f"{course.name}-{plain}-{seed}-{key(course, what, seed)}{ENDING}"

    def has(self, course: Course, what: Part | Stack | None, seed: int) -> bool:
        return self._path(course, as_stack(what), seed).exists()

    def record(self, course: Course, what: Part | Stack | None, seed: int, report: Steps = lambda _: None) -> Record:
        """Train under a mechanism (softmax for None) and measure, unless that is done."""
        stack = as_stack(what)
        path = self._path(course, stack, seed)
        if path.exists():
            return read(path)
        found = train(course, stack, seed, report)
        active: list[bool] = []

        @contextmanager
        def again(*readers: Method) -> Iterator[Run]:
            with opened(course, stack, seed, found.weights, *readers) as run:
                yield run
                active.append(not len(stack) or run.active)

        numbers = course.measure(again, seed)
        ratios, plain = costs.measure(course, stack, seed)
        record = Record(
            key(course, stack, seed), course.name, asdict(course), name_of(stack), seed, numbers | ratios,
            found.losses, found.norms, found.parameters, found.learned, any(active), found.seconds, plain,
            surroundings(torch.device("cuda" if torch.cuda.is_available() else "cpu")), Fitted(found.weights).digest,
        )  # fmt: skip
        mine = path.with_name(f"{path.name}.{os.getpid()}")  # another process may be making the same one
        with writing(path):
            with placed(_weights(mine)) as beside:
                save_file(found.weights, beside)
            _weights(mine).replace(_weights(path))
            replace_text(mine, json.dumps(sealed(asdict(record))) + "\n")
            mine.replace(path)
        return read(path)

    @contextmanager
    def opened(self, course: Course, what: Part | Stack | None, seed: int, *readers: Method) -> Iterator[Run]:
        """The trained model under its mechanism, without gradients, and what of these readers can act beside it."""
        stack = as_stack(what)
        weights = _trained(self._path(course, stack, seed), self.record(course, stack, seed))
        with opened(course, stack, seed, weights, *readers) as run:
            yield run

    def all(self) -> list[Record]:
        return [read(path) for path in sorted(self.folder.glob(f"*{ENDING}"))]


def _weights(path: Path) -> Path:
    return path.with_name(path.name + ".safetensors")


def read(path: Path) -> Record:
    """A record from its file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["digest"] != digest_of(found):
            raise ValueError("it was damaged or changed after it was saved")
        return Record(**{f.name: found[f.name] for f in fields(Record)})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StatisticError(f"{path} is no record of a training ({error}); remove it to train anew") from error


def _trained(path: Path, record: Record) -> dict[str, Tensor]:
    """The weights that a record names."""
    try:
        found = Fitted.load(_weights(path))
        if found.digest != record.weights:
            raise ValueError("its checksum is another")
        return dict(found)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise StatisticError(f"{_weights(path)} was damaged ({error}); remove {path.name} to train anew") from error
