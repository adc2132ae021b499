"""The library's functions, which are no methods: how each is called, what it does, and the paper that it follows."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import heedful
from heedful import explaining
from heedful.catalogue import find
from heedful.core.entry import CatalogueEntry
from heedful.core.errors import CatalogueError, nearest
from heedful.core.paper import Paper
from heedful.core.reading import name_in

SOUGHT = {  # what people look for that is a function of the library and no method
    "ablate, ablation, knock out, knockout, zero a head, mean ablation": "heedful.ablate(model, heads, mean=texts)",
    "attention patterns, attention maps, view, bertviz, circuitsvis": "heedful.patterns(model, text)",
    "logit lens": "heedful.explaining.logit_lens(model, text)",
    "direct logit attribution, dla": "heedful.explaining.direct_logits(model, text, answer, instead)",
    "activation patching, causal tracing": "heedful.explaining.trace(model, clean, corrupt, answer, instead)",
    "attribution patching, head patching": "heedful.explaining.patching(model, clean, corrupt, metric, estimate=True)",
    "path patching, circuit": "heedful.explaining.path_patching(model, clean, corrupt, metric)",
    "faithfulness, deletion, insertion": "heedful.explaining.faithfulness(model, text, scores)",
    "diagnose, head roles, profile": "heedful.diagnose(model, texts)",
    "compare, recommend, benchmark, which budget, cache budget": "heedful.compare(model, methods, tasks)",
    "train from scratch, learning curves": "heedful.lab(mechanisms)",
    "save and load, from_pretrained": "heedful.load(folder)",
    "hook, own function, edit activations": "heedful.edit(site, function)",
}


@dataclass(frozen=True)
class Function:
    """A function of the library, by the name that it is imported by."""

    name: str
    itself: Callable[..., Any]

    @property
    def paper(self) -> Paper | None:
        """The paper whose idea it is: its file names it."""
        return getattr(sys.modules[self.itself.__module__], "PAPER", None)

    @property
    def about(self) -> str:
        return inspect.cleandoc(self.itself.__doc__ or "")

    @property
    def call(self) -> str:
        """How it is called with what it cannot do without."""
        given = inspect.signature(self.itself).parameters.values()
        needed = [x for x in given if x.default is x.empty and x.kind is not x.VAR_KEYWORD]
        return f"{self.name}({', '.join(f'*{x.name}' if x.kind is x.VAR_POSITIONAL else x.name for x in needed)})"

    @property
    def options(self) -> dict[str, str]:
        """What it may be given beside that, by name: its kind and its default."""
        given = inspect.signature(self.itself).parameters.values()
        named = {x.name: f": {x.annotation} = {x.default!r}" for x in given if x.default is not x.empty}
        return named | {f"**{x.name}": "" for x in given if x.kind is x.VAR_KEYWORD}


@cache
def functions() -> dict[str, Function]:
    """Those of `heedful` and of `heedful.explaining`, by their last names."""
    known: dict[str, Function] = {}
    for home in (heedful, explaining):
        for name in home.__all__:
            itself = getattr(home, name)
            if isinstance(itself, FunctionType) and name not in known:
                known[name] = Function(f"{home.__name__}.{name}", itself)
    return dict(sorted(known.items()))


def found(name: str) -> type[CatalogueEntry] | Function:
    """The method of that name or paper, or else the function, however its name is written."""
    asked = name_in(name)  # what it is called with changes nothing
    try:
        return find(asked)
    except CatalogueError as unknown:
        low, known = asked.lower(), functions()
        by_key = {paper.key.lower(): one for one in known.values() if one.paper for paper in one.paper.every}
        function = by_key.get(low) or known.get(low.rpartition(".")[2].replace("-", "_"))
        if function is None:
            if near := nearest(low, known):
                raise CatalogueError(f"{unknown}. Of functions:{near}") from None
            raise
        return function


def sought(word: str) -> list[str]:
    """Calls of the functions that the word may mean, by what they are for, their names or their papers."""
    if not (low := word.lower()):
        return []
    known = {call.partition("(")[0]: (words, call) for words, call in SOUGHT.items()}
    calls = []
    for name, function in functions().items():
        words, call = known.get(function.name, ("", function.call))
        told = [words, name, name.replace("_", " ")]
        if function.paper:
            told += [function.paper.title, function.paper.key, function.paper.authors]
        if any(low in one.lower() for one in told):
            calls.append(call)
    return calls
