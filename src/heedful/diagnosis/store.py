"""Profiles on disk. `profile.json` names its statistics file and is renamed into place last: that is the commit."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heedful.catalogue import entries, find
from heedful.core.call import Phase
from heedful.core.errors import DefinitionError, StatisticError
from heedful.core.kinds import Measure, Weights
from heedful.core.method import Method, Scoped, method_of
from heedful.core.stats import Cat, load, save
from heedful.diagnosis.profile import Profile
from heedful.diagnosis.view import TokenView

NAME, FORMAT = "profile.json", 1
VIEW = "view"  # the key of the token view's tensors, which no reader has


def spelled(part: Measure) -> dict[str, Any]:
    """A measure as plain values."""
    method = method_of(part)
    out: dict[str, Any] = {"method": type(method).__name__, "fields": dict(vars(method))}
    if isinstance(part, Scoped):
        out |= {"layers": part.layers, "heads": part.heads, "phase": part.phase and part.phase.value}
    return out


def built(spelling: dict[str, Any]) -> Measure:
    """The measure that `spelled` described."""
    kind = find(spelling["method"])
    if not issubclass(kind, Method | Weights):
        raise DefinitionError(f"{spelling['method']} is {kind.kind} and measures nothing")
    method = kind(**{name: _tupled(value) for name, value in spelling["fields"].items()})
    if isinstance(method, Weights) or "layers" not in spelling:
        return method
    phase = spelling["phase"]
    return Scoped(method, _tupled(spelling["layers"]), _tupled(spelling["heads"]), Phase(phase) if phase else None)


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn the ways in which a disk says no into one plain error."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StatisticError(
            f"cannot write to {where}: {reason}; nothing half-written was left there. Free some space, or name another "
            "folder that can be written"
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Write a file beside, then rename it."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def save_profile(profile: Profile, folder: Path) -> Path:
    view = profile.view
    new = folder / f"statistics-{uuid.uuid4().hex[:8]}.safetensors"
    content = {
        "format": FORMAT,
        "facts": profile.facts,
        "parts": [spelled(part) for part in profile.parts],
        "statistics": new.name,
        "view": view and {"tokens": view.tokens, "heads": view.heads},
    }
    try:
        text = json.dumps(content, indent=1)
    except TypeError as error:
        raise StatisticError(f"cannot save the measures {profile.parts}: {error}") from error
    statistics = dict(profile.statistics)
    if view is not None:
        statistics[VIEW] = Cat({"keys": view.keys, "weights": view.weights, "received": view.received})
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save(new, statistics)
            replace_text(folder / NAME, text)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        for old in folder.glob("statistics-*.safetensors"):
            if old != new:
                old.unlink(missing_ok=True)
    return folder


def load_profile(folder: Path) -> Profile:
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        facts, spellings, view, name = (content[key] for key in ("facts", "parts", "view", "statistics"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StatisticError(
            f"{folder} holds no profile that can be read ({error}): give a folder that Profile.save() or "
            "`heedful diagnose --out` wrote"
        ) from error
    if content.get("format") != FORMAT:
        raise StatisticError(f"{folder} was written by another release of heedful: measure again, or read it with that")
    entries()  # importing the methods makes their statistics known
    statistics = load(folder / name)
    if view is not None:
        tensors = statistics.pop(VIEW).tensors()
        view = TokenView(view["tokens"], [(layer, head) for layer, head in view["heads"]], **tensors)
    return Profile(facts, tuple(map(built, spellings)), statistics, view)
