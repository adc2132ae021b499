"""Methods joined in order. A stack is a value: it prints, hashes, compares and can be cited."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from heedful.core.call import Phase
from heedful.core.errors import ClashError, DefinitionError, FieldError, shown
from heedful.core.method import Method, Part, Scoped, method_of
from heedful.core.paper import UNPUBLISHED
from heedful.core.sites import MAP_SITES, SINGLE_SITES, Edit, Site


@dataclass(frozen=True)
class Step:
    """One edit of one part, as the engine runs it."""

    number: int  # the part's place in the stack
    part: Part
    edit: Edit

    @property
    def method(self) -> Method:
        return method_of(self.part)

    @property
    def heads(self) -> tuple[int, ...] | None:
        return self.part.heads if isinstance(self.part, Scoped) else None

    @property
    def first(self) -> int | None:
        """How many of a call's first rows a reader wants; None for all."""
        return getattr(self.method, self.edit.first) or None if self.edit.first else None

    def __str__(self) -> str:
        return f"{self.part!r} at {self.edit.site.name}"


def apart(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The readers of a pattern's first rows that are served beside the backend: all, where nothing edits the map."""
    if any(s.edit.site in MAP_SITES and not s.edit.reads for s in steps):
        return ()
    return tuple(s for s in steps if s.edit.site is Site.PATTERN and s.first is not None)


def _overlap(a: Part, b: Part) -> bool:
    """Whether two parts can meet in one layer, head and phase."""

    def meet(x: tuple[int, ...] | None, y: tuple[int, ...] | None) -> bool:
        return x is None or y is None or bool(set(x) & set(y))

    if not (isinstance(a, Scoped) and isinstance(b, Scoped)):
        return True
    phases = a.phase is None or b.phase is None or a.phase is b.phase
    return meet(a.layers, b.layers) and meet(a.heads, b.heads) and phases


def clash(a: Part, b: Part) -> str | None:
    """Why two parts cannot act together, or None."""
    if not _overlap(a, b):
        return None
    one, two = method_of(a), method_of(b)
    for x, y in ((one, two), (two, one)):
        for base in type(y).__mro__:
            if base.__name__ in x.forbids:
                return x.forbids[base.__name__]
        if any(e.site is Site.BLOCK for e in x.edits):
            inner = next((e.site.name for e in y.edits if e.site.inside), None)
            if inner:
                return f"{type(x).__name__} replaces the whole block, so there is no {inner} for {type(y).__name__}"
        mixes = any(e.site is Site.MIX for e in x.edits)
        mapped = next((e.site.name for e in y.edits if e.site in MAP_SITES), None)
        if mixes and mapped:
            return f"{type(x).__name__} replaces the attention map, so there is no {mapped} for {type(y).__name__}"
        if mixes and any(e.site is Site.MASK for e in y.edits):
            return f"{type(x).__name__} computes no single pairs, so {type(y).__name__} has none to mask"
    for site in SINGLE_SITES:
        if all(any(e.site is site and not e.reads for e in m.edits) for m in (one, two)):
            return f"both replace {site.name}, and a layer has one"
    return None


@dataclass(frozen=True)
class Stack:
    """Parts in the order in which they act at a shared site."""

    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple):
            raise FieldError(self, "parts", self.parts, "must be a tuple of methods", ("TempScale(0.9)",))
        for i, part in enumerate(self.parts):
            if not isinstance(part, Method | Scoped):
                what = f"the class {part.__name__}" if isinstance(part, type) else shown(part)
                raise DefinitionError(f"a stack holds methods, not {what}; join methods with |, as in A() | B()")
            for other in self.parts[:i]:
                if reason := clash(other, part):
                    raise ClashError(f"{other!r} | {part!r}: {reason}")

    def __or__(self, other: Part | Stack) -> Stack:
        return Stack((*self.parts, *(other.parts if isinstance(other, Stack) else (other,))))

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts)) or "Stack()"

    @property
    def methods(self) -> tuple[Method, ...]:
        return tuple(method_of(part) for part in self.parts)

    def steps(self, layer: int | None = None, phase: Phase | None = None) -> tuple[Step, ...]:
        """Every edit in the order of sites, then of parts, that acts in the layer and phase."""
        found = []
        for number, part in enumerate(self.parts):
            if isinstance(part, Scoped):
                if layer is not None and part.layers is not None and layer not in part.layers:
                    continue
                if phase is not None and part.phase is not None and phase is not part.phase:
                    continue
            found += [Step(number, part, edit) for edit in method_of(part).edits]
        return tuple(sorted(found, key=lambda s: (s.edit.site.order, s.number)))

    def touches(self, *sites: Site) -> bool:
        return any(step.edit.site in sites for step in self.steps())

    def cite(self) -> str:
        """BibTeX of exactly the papers in this stack."""
        papers = (method.paper for method in self.methods)
        return "\n\n".join(dict.fromkeys(paper.bibtex() for paper in papers if paper is not UNPUBLISHED))


def as_stack(what: Part | Stack) -> Stack:
    return what if isinstance(what, Stack) else Stack((what,))
