"""Picks the cheapest backend that can serve a call, and can say every reason against the others."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from heedful.core.asked import asks
from heedful.core.errors import BackendError, FieldError
from heedful.core.figures import printed
from heedful.core.method import Part, Stack, as_stack
from heedful.core.sites import HEADLESS_SITES, Site
from heedful.engine.backends import BACKENDS, Backend
from heedful.engine.needs import Needs


def backend_named(backend: str, owner: str = "attach()") -> str:
    """The name itself if it is one; an error that lists them otherwise."""
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):
        known = ", ".join(["auto", *BACKENDS])
        raise FieldError(owner, "backend", backend, f"must be one of {known}", "auto")
    return backend


def select(requested: str, needs: Needs) -> Backend:
    """The backend asked for, or with 'auto' the first that refuses nothing."""
    if requested == "auto":
        return next(b for b in BACKENDS.values() if not b.refuses(needs))
    if reasons := BACKENDS[requested].refuses(needs):
        raise BackendError(f"backend {requested!r} cannot serve this call: " + "; ".join(reasons))
    return BACKENDS[requested]


def select_once(requested: str, needs: Needs, known: dict[Hashable, Backend]) -> Backend:
    """The same, and where the steps are those of which some choices are `known`, only for calls of another kind."""
    if (kind := needs.kind) is None:
        return select(requested, needs)
    if (requested, kind) not in known:
        known[requested, kind] = select(requested, needs)
    return known[requested, kind]


@dataclass(frozen=True)
class Choice:
    """One backend for a stack: chosen, possible, or every reason against it."""

    backend: str
    chosen: bool
    reasons: tuple[str, ...]
    runs: str = ""  # what is called, where the name does not say it

    def __str__(self) -> str:
        state = "chosen" if self.chosen else "possible, but dearer" if not self.reasons else "no"
        state += f": {self.runs}" if self.runs and not self.reasons else ""
        return f"{self.backend:<10} {state}" + "".join(f"\n           - {r}" for r in self.reasons)


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a stack, and why not the others."""

    stack: Stack
    choices: tuple[Choice, ...]
    layers: tuple[str, ...] = ()  # of the model, where one is known

    def __str__(self) -> str:
        rows = "\n".join(map(str, self.choices))
        names = self.layers if len(self.layers) < 3 else (self.layers[0], "...", self.layers[-1])
        of = f"\n{len(self.layers)} attention layers: {', '.join(names)}" if names else ""
        return f"{self.stack!r}\n{rows}\n(layers without a step keep the model's own attention){of}"

    def _repr_html_(self) -> str:
        return printed(self)


@asks
def explain(stack: Part | Stack, *, softcap: bool = False, sink: bool = False) -> Explanation:
    """How a stack would be computed in a layer where all of it acts."""
    stack = as_stack(stack)
    needs = Needs.of(stack.steps(), softcap, sink)
    if stack.touches(Site.MIX):
        reason = ("the method replaces scores, normalisation and pattern as a whole and brings its own computation",)
        return Explanation(stack, tuple(Choice(name, False, reason) for name in BACKENDS))
    if not any(s.edit.site not in HEADLESS_SITES for s in stack.steps()):
        reason = ("nothing acts between projection and output projection: the model's own attention runs",)
        return Explanation(stack, tuple(Choice(name, False, reason) for name in BACKENDS))
    best = select("auto", needs)
    choices = tuple(Choice(n, b is best, tuple(b.refuses(needs)), b.runs(needs)) for n, b in BACKENDS.items())
    return Explanation(stack, choices)
