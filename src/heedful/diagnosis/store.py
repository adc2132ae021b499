"""Profiles on disk. `profile.json` names its statistics file and is renamed into place last: that is the commit."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from heedful.catalogue import entries, named
from heedful.core.errors import DefinitionError, HeedfulError, StatisticError
from heedful.core.files import PART, PROFILE, digest_of, replace_text, sealed, writing
from heedful.core.kinds.weights import Measure, Weights
from heedful.core.method import Method, Scoped
from heedful.core.spelling import built, spelled
from heedful.core.stats import Cat, Statistic, load, save
from heedful.diagnosis.glances import ImageView
from heedful.diagnosis.hearing import SoundView
from heedful.diagnosis.measures import readers
from heedful.diagnosis.view import TokenView

FORMAT = 3
ADDED = ("texts", "windows", "tokens", "left_out")  # facts that add up where profiles are merged
STATISTICS = re.compile(r"statistics-[0-9a-f]{8}\.safetensors")
# the facts that a profile tells, and of which kind they are
FACTS: dict[str, type] = {"model": str, "seconds": dict, "skipped": list, "backends": list}
FACTS |= dict.fromkeys(("layers", "heads", "length", *ADDED), int)
VIEW = "view"  # the key of the token view's tensors, which no reader has
APART = "apart."  # what keys of parts of the texts begin with, before the part's number

Found = dict[str, Statistic]
View = TokenView | ImageView | SoundView
# by a field that no other has
VIEWS: dict[str, type[View]] = {"tokens": TokenView, "before": ImageView, "words": SoundView}


def _measure(spelling: Any) -> Measure:
    part = built(spelling, named, {})
    if not isinstance(part, Method | Weights | Scoped):
        raise DefinitionError(f"{type(part).__name__} is {part.kind} and measures nothing")
    return part


def write(
    folder: Path,
    facts: dict[str, Any],
    parts: tuple[Measure, ...],
    statistics: Mapping[str, Statistic],
    view: View | None,
    apart: Sequence[Mapping[str, Statistic]],
) -> Path:
    """A profile into a folder: whole, or not at all."""
    new = folder / f"statistics-{uuid.uuid4().hex[:8]}.safetensors"
    content = {
        "format": FORMAT,
        "facts": facts,
        "parts": [spelled(part) for part in parts],
        "statistics": new.name,
        "view": view and {name: x for name, x in vars(view).items() if not isinstance(x, Tensor)},
    }
    try:
        text = json.dumps(sealed(content), indent=1)
    except TypeError as error:
        raise StatisticError(f"cannot save the measures {parts}: {error}") from error
    whole = dict(statistics)
    whole |= {f"{APART}{i}.{key}": x for i, found in enumerate(apart) for key, x in found.items()}
    if view is not None:
        whole[VIEW] = Cat({name: x for name, x in vars(view).items() if isinstance(x, Tensor)})
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save(new, whole)
            replace_text(folder / PROFILE, text)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        clean(folder, new)
    return folder


def clean(folder: Path, keep: Path | None = None) -> None:
    """Take away the statistics of earlier saves, whole or half written."""
    for pattern in ("statistics-*.safetensors", f"*{PART}"):
        for old in folder.glob(pattern):
            if old != keep:
                old.unlink(missing_ok=True)


def _require(facts: Any, parts: tuple[Measure, ...], statistics: Mapping[str, Statistic]) -> None:
    """Facts of the kinds that a profile tells, and statistics that its measures have read."""
    for name, kind in FACTS.items():
        if type(facts[name]) is not kind:
            raise TypeError(f"{name} is {facts[name]!r}")
    if not all(type(x) in (int, float) for x in facts["seconds"].values()):
        raise TypeError(f"seconds are {facts['seconds']}")
    if not all(isinstance(x, str) for x in (*facts["skipped"], *facts["backends"])):
        raise TypeError(f"skipped is {facts['skipped']}, backends are {facts['backends']}")
    for key in statistics:
        number, reader, layer = key.split(".")
        if reader not in readers(parts[int(number)]) or int(layer) < 0:
            raise KeyError(key)


def read(folder: Path) -> tuple[dict[str, Any], tuple[Measure, ...], Found, View | None, tuple[Found, ...]]:
    """What `write` wrote, in its order."""
    try:
        content = json.loads((folder / PROFILE).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"{PROFILE} holds no object")
        facts, spellings, view, name, of, digest = (
            content[key] for key in ("facts", "parts", "view", "statistics", "format", "digest")
        )
        whole = digest == digest_of(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StatisticError(
            f"{folder} holds no profile that can be read ({error}): give a folder that Profile.save() or "
            "`heedful diagnose --out` wrote"
        ) from error
    if of != FORMAT:
        raise StatisticError(f"{folder} was written by another release of heedful: measure again, or read it with that")
    if not isinstance(name, str) or not STATISTICS.fullmatch(name):
        raise StatisticError(
            f"{folder / PROFILE} names {name!r} as its statistics, and they lie beside it as statistics-*.safetensors: "
            "measure again"
        )
    if not whole:
        raise StatisticError(f"{folder / PROFILE} was damaged or changed after it was saved: measure again")
    entries()  # importing the methods makes their statistics known
    statistics = load(folder / name)
    try:
        if view is not None:
            tensors = statistics.pop(VIEW).tensors()
            heads = {key: [(layer, head) for layer, head in view[key]] for key in ("heads", "meant") if key in view}
            plain: dict[str, Any] = {**view, **heads, **tensors}
            (kind,) = (VIEWS[field] for field in VIEWS if field in plain)
            view = kind(**plain)
        parts = tuple(map(_measure, spellings))
        apart: dict[int, Found] = {}
        for key in [key for key in statistics if key.startswith(APART)]:
            number, _, name = key.removeprefix(APART).partition(".")
            apart.setdefault(int(number), {})[name] = statistics.pop(key)
        for found in (statistics, *apart.values()):
            _require(facts, parts, found)
        return facts, parts, statistics, view, tuple(apart[i] for i in sorted(apart))
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, HeedfulError):
            raise
        raise StatisticError(f"{folder} holds a profile whose parts do not fit together ({error!r})") from error
