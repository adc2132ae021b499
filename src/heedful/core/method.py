"""What a method is: a frozen value that edits one or two sites of the attention call, or reads one."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar, dataclass_transform

from torch import Tensor

from heedful.core.asked import after_kinds, require_fields
from heedful.core.call import Call, Phase
from heedful.core.errors import DefinitionError, FieldError
from heedful.core.figures import Description
from heedful.core.paper import UNPUBLISHED, Paper
from heedful.core.sites import HEADLESS_SITES, Edit, Site
from heedful.core.stats import Statistic

if TYPE_CHECKING:
    from heedful.core.kinds import HeadWeights
    from heedful.core.stack import Stack


@dataclass(frozen=True)
class Layer:
    """The size of one attention layer, for methods that bring parameters of their own."""

    number: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    width: int


class Readings(Mapping[int, Statistic]):
    """What one reading function found, by layer."""

    def __init__(self, by_layer: Mapping[int, Statistic]) -> None:
        self._by_layer = dict(sorted(by_layer.items()))

    def __getitem__(self, layer: int) -> Statistic:
        return self._by_layer[layer]

    def __iter__(self) -> Any:
        return iter(self._by_layer)

    def __len__(self) -> int:
        return len(self._by_layer)

    def __repr__(self) -> str:
        kinds = sorted({type(s).__name__ for s in self._by_layer.values()})
        return f"Readings({len(self)} layers of {', '.join(kinds) or 'nothing'})"

    @property
    def values_by_layer(self) -> list[Any]:
        return [stat.value for stat in self._by_layer.values()]


class Session(Protocol):
    """A run as a fit sees it."""

    roles: dict[str, tuple[tuple[int, int], ...]]

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...

    def __call__(self, **inputs: Any) -> Any: ...

    def __getitem__(self, part: Part) -> Any: ...

    def reset(self) -> None: ...

    def loss(self) -> Tensor: ...

    def parameters(self) -> list[Any]: ...

    def state_dict(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Probe:
    """One input of a measure that needs prompts of its own, and the spans that it looks at."""

    tokens: Tensor  # [b n]
    roles: Mapping[str, tuple[tuple[int, int], ...]]


class FitContext(Protocol):
    """What a fit may do with a model: look at its sizes, weights and words, and run it under a stack."""

    @property
    def layers(self) -> tuple[Layer, ...]: ...

    def weights(self, layer: int) -> Any:
        """The layer's projections, head by head."""
        ...

    def vocabulary(self) -> Any:
        """The rows of the embedding and of the unembedding."""
        ...

    def attach(self, what: Part | Stack, /) -> Session: ...


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class CatalogueEntry(ABC):  # noqa: B024 - what is abstract stands in its kinds
    """Anything with a paper that the catalogue lists: methods, token steps, decoding steps, surgery."""

    paper: ClassVar[Paper] = UNPUBLISHED
    kind: ClassVar[str] = "entry"

    def __post_init__(self) -> None:
        """Refuse fields that do not suit; by then each is known to be of the kind that its annotation names."""
        require_fields(self)

    def __init_subclass__(cls, abstract: bool = False) -> None:
        if "__post_init__" in vars(cls):
            cls.__post_init__ = after_kinds(cls.__post_init__)  # type: ignore[assignment]
        dataclass(frozen=True)(cls)
        private = cls.__name__.startswith("_")  # what only serves another method needs none of its own
        if not abstract and not private and (not isinstance(cls.paper, Paper) or cls.paper is UNPUBLISHED):
            raise DefinitionError(f"{cls.__name__} has no paper: write paper = Paper(key, title, authors, year, ...)")

    @classmethod
    def neutral(cls) -> Self | None:
        """Settings under which nothing changes; None where there are none."""
        return None

    @classmethod
    def example(cls) -> Self:
        """Settings under which something must change."""
        return cls()

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> Self:
        """A new one fitted to data; those without anything to fit return themselves."""
        return self

    def __repr__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(changed)})"


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
    edits: ClassVar[Any] = _Edits(())
    whole_map: ClassVar[bool] = False  # a SCORES or PATTERN edit that must see all rows at once
    causal: ClassVar[bool] = True  # later tokens never change what earlier ones get, if the model is causal
    chunk_invariant: ClassVar[bool] = True  # what a token gets does not depend on how the text was cut into calls
    subjects: ClassVar[tuple[str, ...]] = ("text",)  # what it is for: "text", "image", "encoder-decoder", "cross"
    forbids: ClassVar[dict[str, str]] = {}  # class name -> why the two cannot act together

    def __init_subclass__(cls, abstract: bool = False) -> None:
        super().__init_subclass__(abstract=abstract)
        found: dict[str, Edit] = {}
        for base in reversed(cls.__mro__):
            for name, member in vars(base).items():
                mark = getattr(member, "__heedful_edit__", None)
                if isinstance(mark, Edit):
                    found[name] = mark._replace(name=name)
        cls.edits = _Edits(tuple(sorted(found.values(), key=lambda e: (e.site.order, e.reads))))
        if abstract:
            return
        if not cls.edits:
            raise DefinitionError(f"{cls.__name__} edits no site: mark a function with @at(Site.X) or @reads(Site.X)")
        names = {f.name for f in fields(cls)}
        for edit in cls.edits:
            for word, name in (("when", edit.when), ("first", edit.first)):
                if name and name not in names:
                    raise DefinitionError(f"{cls.__name__}.{edit.name}: {word}={name!r} names no field of the class")
        kinds = [(e.site, e.reads, e.loss, e.when) for e in cls.edits]
        if len(set(kinds)) < len(kinds):
            raise DefinitionError(f"{cls.__name__} marks one site twice: join the functions into one")

    def __or__(self, other: Method | Stack) -> Stack:
        from heedful.core.stack import Stack

        return Stack((self,)) | other

    def on(self, layers: Iterable[int] | int | None = None, heads: Iterable[int] | int | None = None) -> Scoped:
        """The same method for some layers and heads only."""
        return Scoped(self).on(layers, heads)

    def when(self, phase: Phase | str) -> Scoped:
        """The same method for one phase only, 'prefill' or 'decode'."""
        return Scoped(self).when(phase)

    def above(self) -> int:
        """How many rows above its own an edit of SCORES or PATTERN looks at.

        Such an edit is handed tiles with rows to spare, and all keys; what it makes of the rows to spare is dropped.
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
    requested: tuple[Any, ...] = (given,)
    if isinstance(given, Iterable) and not isinstance(given, str | bytes):
        requested = tuple(given)
    if not requested or not all(type(i) is int and i >= 0 for i in requested):
        raise FieldError(owner, field, given, "must be one or more numbers from 0 up", [0, 3])
    return tuple(sorted(set(requested)))


@dataclass(frozen=True, repr=False)
class Scoped:
    """A method restricted to layers, heads or a phase; made by `.on()` and `.when()`."""

    method: Method
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    phase: Phase | None = None

    def __or__(self, other: Method | Scoped | Stack) -> Stack:
        from heedful.core.stack import Stack

        return Stack((self,)) | other

    def on(self, layers: Iterable[int] | int | None = None, heads: Iterable[int] | int | None = None) -> Scoped:
        name = type(self.method).__name__
        layers, heads = _numbers(f"{name}.on()", "layers", layers), _numbers(f"{name}.on()", "heads", heads)
        if heads is not None:
            for edit in self.method.edits:
                if edit.site in HEADLESS_SITES or edit.site is Site.MIX:
                    raise FieldError(f"{name}.on()", "heads", heads, f"{edit.site.name} has no head axis", None)
                if "carried" in edit.sums:
                    raise FieldError(f"{name}.on()", "heads", heads, "it follows the mean over all heads", None)
        return Scoped(self.method, layers or self.layers, heads or self.heads, self.phase)

    def when(self, phase: Phase | str) -> Scoped:
        return Scoped(self.method, self.layers, self.heads, Phase.named(phase))

    def __repr__(self) -> str:
        where = [f"{k}={list(v)}" for k, v in (("layers", self.layers), ("heads", self.heads)) if v is not None]
        out = repr(self.method) + (f".on({', '.join(where)})" if where else "")
        return out + (f".when({self.phase.value!r})" if self.phase else "")


Part = Method | Scoped


E = TypeVar("E", bound=CatalogueEntry)


def method_of(part: Scoped | E) -> Method | E:
    """The method itself, without its restrictions."""
    return part.method if isinstance(part, Scoped) else part
