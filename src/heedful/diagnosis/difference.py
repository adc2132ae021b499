"""What sets two profiles apart: maps of heads less one another, and which heads took up or left a role."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING

from heedful.core.errors import StatisticError
from heedful.core.figures import Figure, Head, HeadMap, head_name

if TYPE_CHECKING:
    from heedful.diagnosis.profile import Profile
    from heedful.report.pictures import Plots


@dataclass(frozen=True)
class Moved:
    """One role in two profiles."""

    role: str
    gained: tuple[Head, ...]  # heads that play it in the first profile alone, strongest first
    lost: tuple[Head, ...]  # in the second alone
    kept: int

    def __str__(self) -> str:
        def named(heads: tuple[Head, ...]) -> str:
            some = ", ".join(head_name(*head) for head in heads[:6])
            return f"{len(heads)}" + (f" ({some}{', ...' if len(heads) > 6 else ''})" if heads else "")

        return f"{self.role}: {self.kept} keep it, gained {named(self.gained)}, lost {named(self.lost)}"


@dataclass(frozen=True, eq=False)
class ProfileDifference:
    """`a - b`: of two models with equally many heads, of one before and after training, or of two texts."""

    one: Profile
    other: Profile

    def __post_init__(self) -> None:
        for fact in ("layers", "heads"):
            mine, theirs = self.one.facts.get(fact), self.other.facts.get(fact)
            if mine != theirs:
                raise StatisticError(f"cannot compare profiles head by head: they have {mine} and {theirs} {fact}")
        if not self.figures():
            raise StatisticError("these two profiles share no map of heads: diagnose both with the same measures")

    @cached_property
    def _figures(self) -> dict[str, HeadMap]:
        mine, theirs = self.one.figures(), self.other.figures()
        return {figure.key: figure for figure in (_less(mine[key], theirs.get(key)) for key in mine) if figure}

    def figures(self) -> dict[str, HeadMap]:
        """The maps of heads that both have, less one another."""
        return self._figures

    def roles(self) -> list[Moved]:
        """How the heads of each role that both tell of have changed."""
        theirs = {role.name: role.heads for role in self.other.roles()}
        found = []
        for role in self.one.roles():
            before = theirs.get(role.name)
            if before is not None:
                gained = tuple(head for head in role.heads if head not in before)
                lost = tuple(head for head in before if head not in role.heads)
                found.append(Moved(role.name, gained, lost, len(set(role.heads) & set(before))))
        return found

    @property
    def plot(self) -> Plots:
        """A plot for each map: `(a - b).plot.sinks()`."""
        from heedful.report.pictures import Plots

        return Plots(self.figures().values())

    def _lines(self) -> Iterator[str]:
        for moved in self.roles():
            if moved.gained or moved.lost:
                yield str(moved)
        for figure in self.figures().values():
            values = figure.values.double()
            known = values[values.isfinite()]
            if len(known) and bool(known.any()):
                at = int(values.nan_to_num(0.0).abs().argmax())
                head = (list(figure.layers)[at // values.shape[1]], at % values.shape[1])
                most, mean = float(values.flatten()[at]), float(known.abs().mean())
                yield f"{figure.title}: {mean:.3g} on average, most in head {head_name(*head)} ({most:+.3g})"

    def __str__(self) -> str:
        lines = list(self._lines()) or ["nothing differs"]
        return "\n".join([f"{self.one.facts['model']} less {self.other.facts['model']}:", *(f"- {x}" for x in lines)])

    def __repr__(self) -> str:
        return f"ProfileDifference({self.one.facts['model']} - {self.other.facts['model']}; {len(self.figures())} maps)"

    def _repr_html_(self) -> str:
        head, *lines = str(self).splitlines()
        return f"<p><b>{escape(head)}</b></p><ul>" + "".join(f"<li>{escape(x[2:])}</li>" for x in lines) + "</ul>"


def _less(a: Figure, b: Figure | None) -> HeadMap | None:
    if not (isinstance(a, HeadMap) and isinstance(b, HeadMap) and a.values.shape == b.values.shape):
        return None
    values = (a.values.double() - b.values.double()).float()
    size = float(values.abs().nan_to_num(0.0).max()) or 1.0
    what = f"{a.what} Here the difference: above 0 it is more in the first profile."
    return HeadMap(a.key, a.title, what, a.layers, values, a.unit, -size, size)
