"""What a diagnosis found: a value that saves, loads, merges, and tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heedful.core.asked import asks
from heedful.core.entry import Readings
from heedful.core.errors import FieldError, StatisticError
from heedful.core.figures import Curves, Description, Figure, Finding, Role, a_few, counted
from heedful.core.files import folder_named
from heedful.core.fitted import Fitted
from heedful.core.kinds.weights import Measure, Weights
from heedful.core.method import method_of
from heedful.core.stats import Max, Statistic, TopK
from heedful.diagnosis.apart import banded, dealt
from heedful.diagnosis.difference import ProfileDifference
from heedful.diagnosis.hearing import SoundView
from heedful.diagnosis.measures import WEIGHTS, readers, reads_text
from heedful.diagnosis.store import ADDED, View, read, write

if TYPE_CHECKING:
    from heedful.report.pictures import Plots

# what two profiles must share to be one; the model's name is not: one model lies in several places
SAME = ("kind", "weights", "layers", "heads", "kv_heads", "width", "parameters")
FEW = 64  # tokens below which shares and rates say little


@dataclass(frozen=True, eq=False)
class Profile:
    """Measures, what they read, and the facts of the run. `a + b` is the profile of both texts."""

    facts: dict[str, Any]  # plain values: model, layers, heads, tokens, seconds, versions ...
    parts: tuple[Measure, ...]
    statistics: dict[str, Statistic]  # by "<part number>.<reader>.<layer>"
    view: View | None = None
    apart: tuple[dict[str, Statistic], ...] = ()  # those of parts of the texts; none where the text is one part

    def __post_init__(self) -> None:
        broken = [key.split(".") for key, stat in self.statistics.items() if _broken(stat)]
        if broken:
            number, _, layer = min(broken, key=lambda key: int(key[2]))
            raise endless(f"what {self.parts[int(number)]!r} found in layer {layer} holds")

    def answer(self, part: Measure) -> Any:
        """What one measure has to tell."""
        if part not in self.parts:
            raise FieldError("Profile", "answer()", part, f"must be one of {self.parts}", next(iter(self.parts), None))
        found = self._readings(part, self.statistics)
        if not found:
            raise StatisticError(f"{part!r} has read nothing: the text holds nothing that it looks at")
        return _answer(part, found)

    def _readings(self, part: Measure, statistics: Mapping[str, Statistic]) -> dict[int, Statistic]:
        number = str(self.parts.index(part))
        found: dict[str, dict[int, Statistic]] = {name: {} for name in readers(part)}
        for key, stat in statistics.items():
            owner, name, layer = key.split(".")
            if owner == number:
                found[name][int(layer)] = stat
        return next(filter(None, found.values()), {})  # as in a run: one reader may only look, and notes nothing

    @cached_property
    def _told(self) -> list[tuple[Measure, Description]]:
        out = []
        for part in self.parts:
            whole, *some = (self._readings(part, x) for x in (self.statistics, *self.apart))
            if not whole:
                continue
            told = _describe(part, whole)
            if sum(map(bool, some)) > 1 and any(isinstance(figure, Curves) for figure in told.figures):
                told = banded(told, [_describe(part, found) for found in some if found])
            out.append((part, told))
        return out

    def viewed(self, view: View | None, seconds: float) -> Profile:
        """The same with its view, and with what is told of it already."""
        spent = self.facts["seconds"]
        facts = {**self.facts, "seconds": {**spent, "view": spent.get("view", 0.0) + seconds}}
        new = replace(self, facts=facts, view=view)
        if "_told" in vars(self):  # it takes long, and has no part in the view
            vars(new)["_told"] = self._told
        return new

    def description(self) -> list[tuple[Measure, Description]]:
        """Figures, roles and findings of each measure that read something."""
        return self._told

    def findings(self) -> list[Finding]:
        """What a reader would want to know, most telling first."""
        found = [*self._cautions(), *(f for _, told in self._told for f in told.findings)]
        return sorted(found, key=lambda f: -f.weight)

    def _cautions(self) -> Iterator[Finding]:
        """What to know before the rest is believed."""
        skipped, tokens = self.facts.get("skipped"), self.facts.get("tokens")
        if skipped:
            read = counted(self.facts["texts"] + len(skipped), self.facts.get("reads", "text"))
            yield Finding(f"{len(skipped)} of {read} left out: {a_few(skipped)}.", 1.0)
        if tokens is not None and tokens < FEW and any(map(reads_text, self.parts)):
            yield Finding(f"{tokens} tokens are too few to tell much of a model; give it {FEW} or more to read.", 1.0)

    def roles(self) -> list[Role]:
        return [role for _, told in self._told for role in told.roles]

    def figures(self) -> dict[str, Figure]:
        viewed = self.view.figures() if isinstance(self.view, SoundView) else ()
        return {figure.key: figure for figure in (*(x for _, told in self._told for x in told.figures), *viewed)}

    @asks
    def __add__(self, other: Profile) -> Profile:
        if self.parts != other.parts:
            raise StatisticError(f"cannot merge profiles of {self.parts} and of {other.parts}: measures must agree")
        for fact in SAME:
            if self.facts.get(fact) != other.facts.get(fact):
                raise StatisticError(
                    f"cannot merge profiles whose {fact} is {self.facts.get(fact)!r} and {other.facts.get(fact)!r}: "
                    "they must be of one model"
                )
        both = dict(self.statistics)
        for key, stat in other.statistics.items():
            same = f".{WEIGHTS}." in key  # of one model
            both[key] = both[key] + stat if key in both and not same else stat
        apart = dealt((*self.in_parts, *other.in_parts))
        return Profile(_both(self.facts, other.facts), self.parts, both, self.view or other.view, apart)

    def __radd__(self, other: object) -> Profile:
        """So that `sum(profiles)` is the profile of all."""
        return self if other == 0 else NotImplemented

    @property
    def in_parts(self) -> tuple[dict[str, Statistic], ...]:
        """The parts of the texts; the whole where that is one part."""
        own = {str(n) for n, part in enumerate(self.parts) if reads_text(part)}
        return self.apart or ({key: x for key, x in self.statistics.items() if key.split(".")[0] in own},)

    @asks
    def __sub__(self, other: Profile) -> ProfileDifference:
        """What sets this one apart from another of equally many layers and heads."""
        return ProfileDifference(self, other)

    @asks
    def save(self, folder: str | Path) -> Path:
        """Write `profile.json` and its statistics into a folder: whole, or not at all."""
        folder = folder_named("Profile.save()", folder)
        return write(folder, self.facts, self.parts, self.statistics, self.view, self.apart)

    @staticmethod
    @asks
    def load(folder: str | Path) -> Profile:
        """Read what `save` wrote."""
        return Profile(*read(folder_named("Profile.load()", folder)))

    @asks
    def tables(self, arrow: bool = False) -> dict[str, Any]:
        """Every figure, the roles and the findings as pandas tables, or as Arrow tables."""
        from heedful.diagnosis.tables import tables

        return tables(self, arrow)

    @asks
    def page(self, path: str | Path) -> Path:
        """Write the page: one HTML file that needs nothing else."""
        from heedful.report import page

        return page.write(self, Path(path))

    @property
    def plot(self) -> Plots:
        """A plot for each figure: `profile.plot.sinks()`."""
        from heedful.report.pictures import Plots

        return Plots(self.figures().values())

    @property
    def headline(self) -> str:
        """The run in one line."""
        facts = self.facts
        left = f" ({facts['left_out']:,} left out in short ends)" if facts.get("left_out") else ""
        return (
            f"{facts['model']}: {counted(facts['layers'], 'layer')} of {counted(facts['heads'], 'head')}, "
            f"{counted(facts['texts'], facts.get('reads', 'text'))} of {counted(facts['tokens'], 'token')}{left}, "
            f"{sum(facts['seconds'].values()):.1f} s"
        )

    def __str__(self) -> str:
        lines = [self.headline]
        for finding in self.findings():
            act = f" Methods that act on this: {', '.join(finding.methods)}." if finding.methods else ""
            lines.append(f"- {finding.text}{act}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Profile({self.headline}; {len(self.parts)} measures)"

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{escape(f.text)}</li>" for f in self.findings())
        return f"<p><b>{escape(self.headline)}</b></p><ul>{items}</ul>"


def _answer(part: Measure, found: Mapping[int, Statistic]) -> Any:
    if isinstance(part, Weights):
        return replace(part, fitted=Fitted(next(iter(found.values())).tensors()))
    return method_of(part).answer(Readings(found))


def _describe(part: Measure, found: Mapping[int, Statistic]) -> Description:
    answer = _answer(part, found)
    return answer.describe() if isinstance(part, Weights) else method_of(part).describe(answer)


def endless(what: str) -> StatisticError:
    """The error for what cannot be measured since it has no end or is no number."""
    return StatisticError(
        f"{what} infinity or what is no number (NaN), the first layer that does, and nothing can be told of that: look "
        "for broken weights, or load the model with dtype=torch.float32"
    )


def _broken(stat: Statistic) -> bool:
    """Whether a statistic holds NaN, or infinity where it is no highest of nothing."""
    tensors = [x for x in stat.tensors().values() if x.is_floating_point()]
    if isinstance(stat, Max | TopK):
        return any(bool(x.isnan().any()) for x in tensors)
    # finite numbers may add up to none that is, but seldom do
    return not all(isfinite(float(x.sum())) or bool(x.isfinite().all()) for x in tensors)


def _both(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of two runs over one model; where they differ and do not add up, those of the first."""
    out = {**b, **a}
    out |= {fact: a[fact] + b[fact] for fact in ADDED if fact in a and fact in b}
    out["skipped"] = [*a.get("skipped", ()), *b.get("skipped", ())]
    out["length"] = max(a["length"], b["length"])
    out["backends"] = sorted({*a["backends"], *b["backends"]})
    out["seconds"] = {k: a["seconds"].get(k, 0.0) + b["seconds"].get(k, 0.0) for k in {**a["seconds"], **b["seconds"]}}
    if a.get("settings") != b.get("settings"):
        out["settings"] = {}
    return out
