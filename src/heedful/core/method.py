"""What a method is, a frozen value that edits sites of the attention call or reads them; and methods joined in order.

A stack is a value: it prints, hashes, compares and can be cited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from heedful.core.asked import whole_number
from heedful.core.call import Call, Phase
from heedful.core.entry import CatalogueEntry, Layer, Probe, Readings
from heedful.core.errors import ClashError, DefinitionError, FieldError, SiteError, shown
from heedful.core.figures import Description
from heedful.core.paper import UNPUBLISHED
from heedful.core.sites import HEADLESS_SITES, MAP_SITES, SINGLE_SITES, Edit, Site
from heedful.core.stats import Statistic

if TYPE_CHECKING:
    from heedful.core.kinds.weights import HeadWeights


class _Edits:
    """The marks of a method's functions: all of them on the class, on a value those that its fields switch on."""

    def __init__(self, marks: tuple[Edit, ...]) -> None:
        self.marks = marks

    def __get__(self, method: Method | None, kind: type[Method]) -> tuple[Edit, ...]:
        if method is None:
            return self.marks
        return tuple(edit for edit in self.marks if not edit.when or getattr(method, edit.when))


class Method(CatalogueEntry, abstract=True):
    """Edits sites, reads them, or penalises what it finds. Set `paper`, name the fields, mark functions with `@at`."""

    kind = "method"
    edits: ClassVar[_Edits] = _Edits(())
    whole_map: ClassVar[bool] = False  # a SCORES or PATTERN edit that must see all rows at once
    anywhere: ClassVar[bool] = False  # its edits look at nothing but a tile, whose rows and keys may lie anywhere
    causal: ClassVar[bool] = True  # later tokens never change what earlier ones get, if the model is causal
    chunk_invariant: ClassVar[bool] = True  # what a token gets does not depend on how the text was cut into calls
    subjects: ClassVar[tuple[str, ...]] = ("text",)  # what it is for: "text", "image", "encoder-decoder", "cross"
    every_token: ClassVar[bool] = False  # it wants all tokens in their places, as the patches of an image in rows
    one_text: ClassVar[bool] = False  # it takes a row for one text, so a row in which several are packed is refused
    forbids: ClassVar[dict[str, str]] = {}  # class, or site that it changes -> why the two cannot act together

    def __init_subclass__(cls, abstract: bool = False) -> None:
        super().__init_subclass__(abstract=abstract)
        found: dict[str, Edit] = {}
        for base in reversed(cls.__mro__):
            for name, member in vars(base).items():
                mark = getattr(member, "__heedful_edit__", None)
                if isinstance(mark, Edit):
                    found[name] = mark._replace(name=name)
        marks = tuple(sorted(found.values(), key=lambda e: (e.site.order, e.reads)))
        cls.edits = _Edits(marks)
        if abstract:
            return
        if not marks:
            raise DefinitionError(f"{cls.__name__} edits no site: mark a function with @at(Site.X) or @reads(Site.X)")
        names = {f.name for f in fields(cls)}
        for edit in marks:
            for word, name in (("when", edit.when), ("first", edit.first)):
                if name and name not in names:
                    raise DefinitionError(f"{cls.__name__}.{edit.name}: {word}={name!r} names no field of the class")
        if any(edit.merges for edit in marks) and (cls.causal or cls.chunk_invariant):
            rule = "merges tokens, and so looks at all of them: set `causal` and `chunk_invariant` to False"
            raise DefinitionError(f"{cls.__name__} {rule}")
        kinds = [(e.site, e.reads, e.loss, e.when, e.training) for e in marks]
        if len(set(kinds)) < len(kinds):
            raise DefinitionError(f"{cls.__name__} marks one site twice: join the functions into one")

    def __or__(self, other: Method | Stack) -> Stack:
        return Stack((self,)) | other

    def on(self, layers: Iterable[int] | int | None = None, heads: Iterable[int] | int | None = None) -> Scoped:
        """The same method for some layers and heads only."""
        return Scoped(self).on(layers, heads)

    def when(self, phase: Phase | str | None = None, *, steps: Iterable[int] | int | None = None) -> Scoped:
        """The same method for one phase only, 'prefill' or 'decode', or for some denoising steps of a diffusion.

        A token alone with a cache behind it is decoded; several at once are a prompt, or a piece of one.
        """
        return Scoped(self).when(phase, steps=steps)

    def above(self) -> int:
        """How many rows above its own an edit of SCORES or PATTERN looks at.

        Such an edit is handed tiles with rows to spare, and all keys from the first that is seen to the last; what it
        makes of the rows to spare is dropped.
        """
        return 0

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        """Fresh learned parameters for one layer; none unless the method learns."""
        return {}

    def declares(self, tokens: int) -> dict[str, float]:
        """Numbers that must come true on one causal text: 'density' of its pairs, cache entries 'kept' a head."""
        return {}

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights | None:
        """The layer's weights with this edit in them, for `heedful.fold`; None where no weights can do what it does.

        What acts at HEAD_OUTPUT goes into `o` and `o_bias`. Under `.on(heads=...)` the `o` of all other heads is zero.
        A constant on top of RESIDUAL goes into `stream`. Biases that a model can have and has not are given to it.
        """
        return None

    def probes(self, vocabulary: Tensor, length: int) -> Iterable[Probe]:
        """The prompts that this measure is taken on, from ordinary tokens; none where the user's own text will do.

        `length` is how many tokens the model takes at most.
        """
        return ()

    def idle(self, call: Call) -> bool:
        """Whether nothing is done in this call: then it costs nothing, and no backend is ruled out for it.

        Asked once a call, before any site: the layer, phase, positions, roles and state are known, and no tensors.
        """
        return False

    def rests(self, tokens: int) -> str | None:
        """Why a text of so many tokens is left as it is; None where it is not, or where the method cannot know."""
        return None

    def carries(self, call: Call) -> Tensor | None:
        """For a reader of "carried": columns `[b k c]` that the mean of the heads' weights is multiplied with."""
        return None

    def finish(self, statistic: Statistic, call: Call) -> Statistic:
        """What one whole call adds to the run, given what its tiles added up to."""
        return statistic

    def answer(self, readings: Readings) -> Any:
        """What a reading method tells after a run."""
        return readings

    def describe(self, answer: Any) -> Description:
        """What of an answer is worth a figure, a role or a sentence."""
        return Description()


def _numbers(owner: str, field: str, given: Iterable[int] | int | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    requested: Any = given.tolist() if hasattr(given, "tolist") else given  # of numpy and torch
    several = isinstance(requested, Iterable) and not isinstance(requested, str | bytes)
    numbers = [whole_number(i) for i in (requested if several else (requested,))]
    if not numbers or any(i is None or i < 0 for i in numbers):
        raise FieldError(owner, field, given, "must be one or more numbers from 0 up", [0, 3])
    return tuple(sorted({i for i in numbers if i is not None}))


@dataclass(frozen=True, repr=False)
class Scoped:
    """A method restricted to layers, heads, a phase or denoising steps; made by `.on()` and `.when()`."""

    method: Method
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    phase: Phase | None = None
    steps: tuple[int, ...] | None = None

    def __or__(self, other: Method | Scoped | Stack) -> Stack:
        return Stack((self,)) | other

    def on(self, layers: Iterable[int] | int | None = None, heads: Iterable[int] | int | None = None) -> Scoped:
        name = type(self.method).__name__
        name = repr(self.method) if name[0] == "_" else name  # what verbs make for themselves is called like these
        layers, heads = _numbers(f"{name}.on()", "layers", layers), _numbers(f"{name}.on()", "heads", heads)
        if heads is not None:
            for edit in self.method.edits:
                if edit.site in HEADLESS_SITES or edit.site is Site.MIX:
                    rule = f"it acts at {edit.site.name}, which has no head axis; leave them out"
                    raise FieldError(f"{name}.on()", "heads", heads, rule, None)
                if "carried" in edit.sums:
                    raise FieldError(f"{name}.on()", "heads", heads, "it follows the mean over all heads", None)
        return replace(self, layers=layers or self.layers, heads=heads or self.heads)

    def when(self, phase: Phase | str | None = None, *, steps: Iterable[int] | int | None = None) -> Scoped:
        owner = f"{type(self.method).__name__}.when()"
        if phase is None:
            if steps is None:
                raise FieldError(owner, "phase", None, "must name a phase, unless `steps` names some steps", "prefill")
            return replace(self, steps=_numbers(owner, "steps", steps))
        for edit in self.method.edits:
            if edit.before_rotary:
                rule = "it asks for keys from before the rotary embedding, and a cache cannot hold both kinds"
                raise FieldError(owner, "phase", phase, rule, None)
        return replace(self, phase=Phase.named(phase), steps=_numbers(owner, "steps", steps) or self.steps)

    def __repr__(self) -> str:
        where = [f"{k}={list(v)}" for k, v in (("layers", self.layers), ("heads", self.heads)) if v is not None]
        out = repr(self.method) + (f".on({', '.join(where)})" if where else "")
        when = [repr(self.phase.value)] if self.phase else []
        when += [f"steps={list(self.steps)}"] if self.steps else []
        return out + (f".when({', '.join(when)})" if when else "")


Part = Method | Scoped


E = TypeVar("E", bound=CatalogueEntry | None)


def method_of(part: Scoped | E) -> Method | E:
    """The method itself, without its restrictions."""
    return part.method if isinstance(part, Scoped) else part


@dataclass(frozen=True, eq=False)
class Step:
    """One edit of one part, as the engine runs it. A stack has each once, so one is equal to itself alone."""

    number: int  # the part's place in the stack
    part: Part
    edit: Edit

    @cached_property
    def method(self) -> Method:
        return method_of(self.part)

    @cached_property
    def act(self) -> Callable[..., Any]:
        """What it does: the function that its method marked."""
        return getattr(self.method, self.edit.name)

    @cached_property
    def heads(self) -> tuple[int, ...] | None:
        return self.part.heads if isinstance(self.part, Scoped) else None

    @property
    def always(self) -> bool:
        """Whether it acts in every call of its layers."""
        if isinstance(self.part, Scoped) and (self.part.phase or self.part.steps):
            return False
        if self.edit.training is not None:
            return False
        return type(self.method).idle is Method.idle

    @property
    def first(self) -> int | None:
        """How many of a call's first rows a reader wants; None for all."""
        return getattr(self.method, self.edit.first) or None if self.edit.first else None

    def __str__(self) -> str:
        return f"{self.part!r} at {self.edit.site.name}"

    def fault(self, call: Call, what: str) -> SiteError:
        """The error that says what was wrong with it in a call."""
        return SiteError(f"{self}, layer {call.layer}: {what}")


def _overlap(a: Part, b: Part) -> bool:
    """Whether two parts can meet in one layer, head, phase and denoising step."""

    def meet(x: tuple[int, ...] | None, y: tuple[int, ...] | None) -> bool:
        return x is None or y is None or bool(set(x) & set(y))

    if not (isinstance(a, Scoped) and isinstance(b, Scoped)):
        return True
    phases = a.phase is None or b.phase is None or a.phase is b.phase
    return meet(a.layers, b.layers) and meet(a.heads, b.heads) and meet(a.steps, b.steps) and phases


def _acts(part: Part, layer: int | None, phase: Phase | None) -> bool:
    if not isinstance(part, Scoped):
        return True
    elsewhere = layer is not None and part.layers is not None and layer not in part.layers
    return not elsewhere and (phase is None or part.phase is None or phase is part.phase)


def clash(a: Part, b: Part) -> str | None:
    """Why two parts cannot act together, or None."""
    one, two = method_of(a), method_of(b)
    for x, y in ((one, two), (two, one)):
        if not any(e.merges for e in x.edits):
            continue  # what one does in some layer is felt in all behind it
        if any(e.merges for e in y.edits):
            return "both merge tokens, and each counts those that it knows"
        if any(e.reads for e in y.edits):
            name = type(x).__name__
            return f"{name} merges tokens, so that what {type(y).__name__} reads would be of several at once"
        if y.every_token:
            return f"{type(x).__name__} merges tokens, and {type(y).__name__} wants them all, in their places"
    if not _overlap(a, b):
        return None
    for x, y in ((one, two), (two, one)):
        changed = [e.site.name for e in y.edits if not e.reads]
        for name in (*(base.__name__ for base in type(y).__mro__), *changed):
            if name in x.forbids:
                return x.forbids[name]
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
                away = f", which goes to {part.handed_to}" if isinstance(part, CatalogueEntry) else ""
                raise DefinitionError(f"a stack holds methods, not {what}{away}; join methods with |, as in A() | B()")
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

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        return tuple(method_of(part) for part in self.parts)

    def steps(self, layer: int | None = None, phase: Phase | None = None) -> tuple[Step, ...]:
        """Every edit in the order of sites, then of parts, that acts in the layer and phase."""
        return tuple(s for s in self._all if _acts(s.part, layer, phase))

    @cached_property
    def _all(self) -> tuple[Step, ...]:
        found = (Step(number, part, edit) for number, part in enumerate(self.parts) for edit in method_of(part).edits)
        return tuple(sorted(found, key=lambda s: (s.edit.site.order, s.number)))

    @cached_property
    def merges(self) -> bool:
        """Whether some part may leave later layers fewer tokens."""
        return any(step.edit.merges for step in self.steps())

    @cached_property
    def _sites(self) -> frozenset[Site]:
        return frozenset(step.edit.site for step in self.steps())

    def touches(self, *sites: Site) -> bool:
        return not self._sites.isdisjoint(sites)

    def cite(self) -> str:
        """BibTeX of exactly the papers in this stack."""
        papers = (paper for method in self.methods for paper in method.paper.every if paper is not UNPUBLISHED)
        return "\n\n".join(dict.fromkeys(paper.bibtex() for paper in papers))


def as_stack(what: Part | Stack | None) -> Stack:
    """A stack of the part, or of none."""
    return what if isinstance(what, Stack) else Stack(() if what is None else (what,))
