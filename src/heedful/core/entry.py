"""What the catalogue lists, and what a fit and a measure are given: sizes, readings, prompts, a model to look at."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import Field, dataclass, field, fields
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, dataclass_transform

from torch import Tensor

from heedful.core.asked import after_kinds, known_fields, require_fields
from heedful.core.errors import DefinitionError
from heedful.core.paper import UNPUBLISHED, Paper
from heedful.core.regions import Roles
from heedful.core.stats import Statistic

if TYPE_CHECKING:
    from heedful.core.kinds.weights import HeadWeights, Surgery, Vocabulary
    from heedful.core.method import Part, Stack

_FUNCTIONS = (FunctionType, classmethod, property)


@dataclass(frozen=True)
class Layer:
    """The size of one attention layer, for methods that bring parameters of their own."""

    number: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    width: int
    highest: int = 0  # number of the last layer of the list that it stands in, as a call tells

    @property
    def ends_list(self) -> bool:
        """Whether no later layer goes on from this one's stream."""
        return self.number == self.highest


class Readings(Mapping[int, Statistic]):
    """What one reading function found, by layer."""

    def __init__(self, by_layer: Mapping[int, Statistic]) -> None:
        self._by_layer = dict(sorted(by_layer.items()))

    def __getitem__(self, layer: int) -> Statistic:
        return self._by_layer[layer]

    def __iter__(self) -> Iterator[int]:
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

    roles: Any  # spans of token positions by name, or a list of these with one for each text

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...

    def __call__(self, **inputs: Any) -> Any: ...

    def __getitem__(self, part: Part) -> Any: ...

    def denoising(self, number: int, of: int) -> AbstractContextManager[None]: ...

    def reset(self) -> None: ...

    def loss(self) -> Tensor: ...

    def parameters(self) -> list[Any]: ...

    def state_dict(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Probe:
    """One input of a measure that needs prompts of its own, and the spans that it looks at."""

    tokens: Tensor  # [b n]
    roles: Roles | Sequence[Roles]  # in all rows, or in each


class FitContext(Protocol):
    """What a fit may do with a model: look at its sizes, weights and words, and run it under a stack."""

    @property
    def layers(self) -> tuple[Layer, ...]: ...

    def weights(self, layer: int) -> HeadWeights:
        """The layer's projections, head by head."""
        ...

    def scale(self, layer: int) -> Tensor | None:
        """What the layer's block multiplies with that its attention gives (LayerScale), `[e]`; None where nothing."""
        ...

    def vocabulary(self) -> Vocabulary:
        """The rows of the embedding and of the unembedding."""
        ...

    def attach(self, what: Part | Stack, /) -> Session: ...

    def after(self, surgery: Surgery, /) -> FitContext:
        """A copy of the model with its weights edited: what a fit finds there, step by step."""
        ...


def _require_own_names(cls: type[CatalogueEntry]) -> None:
    """Refuse a field, or a function marked for a site, that would take the place of what every entry has."""
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("heedful.core.")]
    taken = {"kind"} | {name for base in bases for name, x in vars(base).items() if isinstance(x, _FUNCTIONS)}
    marked = {name for name, member in vars(cls).items() if hasattr(member, "__heedful_edit__")}
    for what, names in (("field", {f.name for f in fields(cls)}), ("marked function", marked)):
        if clashing := sorted(names & taken):
            raise DefinitionError(
                f"{cls.__name__} has a {what} named {clashing[0]}, which says something else of every entry; "
                "give it another name"
            )


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class CatalogueEntry(ABC):  # noqa: B024 - what is abstract stands in its kinds
    """Anything with a paper that the catalogue lists: methods, token steps, decoding steps, surgery."""

    paper: ClassVar[Paper] = UNPUBLISHED
    kind: ClassVar[str] = "entry"
    handed_to: ClassVar[str] = "heedful.attach()"
    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # each is made a dataclass below

    def __post_init__(self) -> None:
        """Refuse fields that do not suit; by then each is known to be what its annotation says."""
        require_fields(self)

    def __init_subclass__(cls, abstract: bool = False) -> None:
        if "__post_init__" in vars(cls):
            cls.__post_init__ = after_kinds(cls.__post_init__)  # type: ignore[assignment]
        dataclass(frozen=True)(cls)
        cls.__init__ = known_fields(cls.__init__, cls.__name__)  # type: ignore[method-assign]
        _require_own_names(cls)
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

    def on(self, *_: Any, **__: Any) -> Any:
        """Methods alone can be restricted."""
        raise self._whole("on")

    def when(self, *_: Any, **__: Any) -> Any:
        """Methods alone can be restricted."""
        raise self._whole("when")

    def _whole(self, word: str) -> DefinitionError:
        name, where = type(self).__name__, self.handed_to
        return DefinitionError(f"{name}.{word}(): it goes to {where}, and methods alone act in some layers or heads")

    def __repr__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)]
        return f"{type(self).__name__}({', '.join(changed)})"
