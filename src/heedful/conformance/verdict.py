"""What a law says of a method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from heedful.core.errors import FieldError, HeedfulError, InactiveWarning
from heedful.core.figures import printed


class Broken(HeedfulError):
    """A method breaks a law; the message says how."""


class DoesNotApply(HeedfulError):
    """A law has nothing to say of a method; the message says why."""


@dataclass(frozen=True)
class Law:
    """One law: a sentence, and a function of a method that raises Broken or DoesNotApply."""

    name: str
    text: str
    kinds: tuple[str, ...]
    tried: Callable[..., None]

    def __call__(self, entry: Any, **how: Any) -> None:
        """Try it on a method; that nothing was changed is for the law to say, and no warning."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InactiveWarning)
            self.tried(entry, **how)


def law(text: str, kinds: tuple[str, ...] = ("method",)) -> Callable[[Callable[..., None]], Law]:
    """Make a law of a function, which goes by the function's name."""
    return lambda function: Law(function.__name__, text, kinds, function)


@dataclass(frozen=True)
class Verdict:
    """A law and what came of it: 'kept', 'broken' or 'does not apply'."""

    law: str
    outcome: str
    reason: str = ""

    def __str__(self) -> str:
        mark = {"kept": "✓", "broken": "✗", "does not apply": "·"}[self.outcome]
        return f"{mark} {self.law}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Report:
    """All verdicts on one method."""

    method: str
    verdicts: tuple[Verdict, ...]

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    def __getitem__(self, name: str) -> Verdict:
        for verdict in self.verdicts:
            if verdict.law == name:
                return verdict
        known = ", ".join(v.law for v in self.verdicts) or "none"
        raise FieldError("Report", "[...]", name, f"was not tried on {self.method}; tried: {known}", "is_documented")

    @property
    def ok(self) -> bool:
        return not self.broken

    @property
    def broken(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.outcome == "broken")

    def __str__(self) -> str:
        kept = sum(v.outcome == "kept" for v in self.verdicts)
        head = f"{self.method}: {kept} laws kept, {len(self.broken)} broken"
        return "\n".join([head, *(f"  {v}" for v in self.verdicts)])

    def _repr_html_(self) -> str:
        return printed(self)
