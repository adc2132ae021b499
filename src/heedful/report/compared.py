"""The page of a comparison, in the frame of the page of a profile."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from heedful.core.figures import Description, Matrix, counted
from heedful.report import data
from heedful.report.page import along, by_kind, entry, html, more, put

WORDS = {
    "over": "What helps it, and what it costs",
    "nothing": "There is nothing to compare yet.",
    "points": "Compared",
    "curves": "Curves",
    "tables": "Scores and costs",
    "used": "What was compared, and by whose method",
}


class Compared(Protocol):
    """What the page needs of a comparison."""

    @property
    def facts(self) -> Mapping[str, Any]: ...

    @property
    def contenders(self) -> list[str]: ...

    @property
    def verdict_words(self) -> Mapping[str, tuple[str, str]]: ...

    @property
    def words(self) -> Mapping[str, str]: ...

    @property
    def matrix(self) -> Matrix: ...

    def description(self) -> Description: ...


def _facts(comparison: Compared) -> list[tuple[str, str]]:
    facts = comparison.facts
    many = counted(len(comparison.contenders) - 1, "method")
    out = [("compared", many), ("on", counted(len(facts.get("tasks", {})), "task"))]
    for name, key in (("weights in", "dtype"), ("run by", "device")):
        if key in facts:
            out.append((name, str(facts[key])))
    if "date" in facts:
        out.append(("date", str(facts["date"])[:10]))
    return out


def _used(comparison: Compared) -> list[dict[str, Any]]:
    """Every method of the catalogue that some contender holds."""
    spelled = comparison.facts.get("contenders", {}).values()
    names = dict.fromkeys(name for text in spelled for name in re.findall(r"\b[A-Z]\w*", text))
    return [found for name in names if "paper" in (found := entry(name))]


def render(comparison: Compared) -> str:
    """The page as text."""
    told = comparison.description()
    figures = [data.figure(figure, "") for figure in told.figures]
    plain = {k: v for k, v in comparison.facts.items() if k not in ("contenders", "code", "tasks", "cache")}
    written = {
        "glances": False,
        "words": {**WORDS, **comparison.words, "verdicts": comparison.verdict_words},
        "model": str(comparison.facts.get("model", "a model")),
        "facts": _facts(comparison),
        "more": more(plain),
        "findings": told.findings,
        "sparks": {},
        "roles": [],
        "role_map": None,
        "matrix": comparison.matrix,
        "acting": [],
        "measures": _used(comparison),
        "kinds": by_kind(figures),
        "along": along(by_kind(figures)),
        "sounds": {"grid": []},
        "certainty": "",
        "view": {},
    }
    return html(written, {"figures": figures})


def write(comparison: Compared, path: str | Path) -> Path:
    return put(render(comparison), path)
