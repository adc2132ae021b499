"""Statistics are commutative monoids: `a + b` merges tiles, batches, processes and machines.

Where two statistics count along a last axis of unlike length (texts of unlike length, say), the shorter is filled up
with what leaves the longer unchanged, so position i always meets position i.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, reduce
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from heedful.core.asked import asks
from heedful.core.errors import StatisticError
from heedful.core.files import placed
from heedful.core.fitted import Fitted, as_it_was, compact, room

FEW = 4096  # numbers that are added faster than it is looked which of them are alike
HEADER, DIGEST, OF = "heedful.statistics", "heedful.digest", "heedful.of"  # what a file says beside its tensors


def _widen(x: Tensor, n: int, fill: float = 0.0) -> Tensor:
    return x if x.shape[-1] == n else torch.nn.functional.pad(x, (0, n - x.shape[-1]), value=fill)


def _added(a: Tensor, b: Tensor) -> Tensor:
    """The sum, the shorter filled up with zeros; what lies once along an axis of both lies once in the sum too."""
    if not a.ndim:
        return a + b
    n = max(a.shape[-1], b.shape[-1])
    if a.numel() < FEW or 0 not in a.stride() or 0 not in b.stride():
        return _widen(a, n) + _widen(b, n)
    once = [not (x or y) for x, y in zip(a.stride(), b.stride(), strict=True)]
    once[-1] &= a.shape[-1] == b.shape[-1]
    few = tuple(slice(1 if one else None) for one in once)
    size = 1 if once[-1] else n
    return (_widen(a[few], size) + _widen(b[few], size)).expand(*a.shape[:-1], n)


def _wide(x: Tensor) -> Tensor:
    """Accumulate in float64 where the device has it; integers stay exact."""
    return x.double() if x.is_floating_point() and x.device.type != "mps" else x


@dataclass(frozen=True, eq=False)
class Statistic(ABC):
    """A value that merges with `+`; subclasses hold tensors and plain settings, which must agree in a merge."""

    kinds: ClassVar[dict[str, type[Statistic]]] = {}
    by_element: ClassVar[bool] = False  # merging treats what stands along all axes but the last alike and apart

    def __init_subclass__(cls, by_element: bool = False) -> None:
        Statistic.kinds[cls.__name__] = cls
        cls.by_element = by_element  # of each class its own: a subclass may merge otherwise

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """This and the other; associative and commutative."""

    @property
    @abstractmethod
    def value(self) -> Any:
        """The statistic itself."""

    @property
    def fits(self) -> bool:
        """Whether its parts belong together, which is asked where they come from a file; most kinds' have one shape."""
        return len({x.shape for x in vars(self).values() if isinstance(x, Tensor)}) < 2

    def __add__(self, other: Self) -> Self:
        if type(other) is not type(self):
            raise StatisticError(f"cannot merge {type(self).__name__} with {type(other).__name__}: kinds must agree")
        for name in _names(type(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
                if mine.shape != theirs.shape and mine.shape[:-1] != theirs.shape[:-1]:
                    raise StatisticError(
                        f"cannot merge {type(self).__name__}.{name} of shape {tuple(mine.shape)} with "
                        f"{tuple(theirs.shape)}: all but the last axis must agree"
                    )
            elif isinstance(mine, Tensor) or isinstance(theirs, Tensor) or mine != theirs:
                raise StatisticError(
                    f"cannot merge {type(self).__name__} of settings {self.settings()} with {other.settings()}: "
                    "settings must agree"
                )
        return self.merge(other)

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name in _names(type(self)) if isinstance(x := getattr(self, name), Tensor)}

    def settings(self) -> dict[str, Any]:
        return {name: x for name in _names(type(self)) if not isinstance(x := getattr(self, name), Tensor)}

    def having(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same with other tensors."""
        return replace(self, **tensors)

    def to(self, device: torch.device | str) -> Self:
        return self.having({name: x.to(device) for name, x in self.tensors().items()})


@cache
def _names(kind: type[Statistic]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


@dataclass(frozen=True, eq=False)
class Sum(Statistic, by_element=True):
    """A sum, elementwise."""

    total: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Self:
        return cls(_wide(x.detach()))

    def merge(self, other: Self) -> Self:
        return type(self)(_added(self.total, other.total))

    @property
    def value(self) -> Tensor:
        return self.total


@dataclass(frozen=True, eq=False)
class Mean(Statistic, by_element=True):
    """A mean with its own count for each element; nan where nothing was counted."""

    total: Tensor
    count: Tensor

    @classmethod
    def of(cls, total: Tensor, count: Tensor | float) -> Self:
        """From sums and how many things went into each."""
        total = _wide(total.detach())
        return cls(total, torch.as_tensor(count, dtype=total.dtype, device=total.device).expand_as(total).clone())

    def merge(self, other: Self) -> Self:
        return type(self)(_added(self.total, other.total), _added(self.count, other.count))

    @property
    def value(self) -> Tensor:
        return self.total / self.count


@dataclass(frozen=True, eq=False)
class Moments(Statistic, by_element=True):
    """Count, mean and spread, merged without cancellation."""

    count: Tensor
    mean: Tensor
    squares: Tensor  # sum of squared distances from the mean

    @classmethod
    def of(cls, samples: Tensor) -> Self:
        """From samples on the first axis."""
        x = _wide(samples.detach())
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1:])
        return cls(torch.full_like(mean, len(x)), mean, (x - mean).square().sum(0))

    def merge(self, other: Self) -> Self:
        a, b = self, other
        if a.mean.ndim:
            n = max(a.mean.shape[-1], b.mean.shape[-1])
            a = type(self)(*(_widen(x, n) for x in a.tensors().values()))
            b = type(self)(*(_widen(x, n) for x in b.tensors().values()))
        count = a.count + b.count
        safe, gap = count.clamp(min=1), b.mean - a.mean
        # symmetric in a and b, so that the order of a merge cannot matter
        mean = (a.mean * a.count + b.mean * b.count) / safe
        return type(self)(count, mean, a.squares + b.squares + gap.square() * (a.count * b.count / safe))

    @property
    def value(self) -> Tensor:
        return self.mean

    @property
    def variance(self) -> Tensor:
        return self.squares / self.count


@dataclass(frozen=True, eq=False)
class Max(Statistic, by_element=True):
    """A maximum and its place; of equal ones the first place."""

    high: Tensor
    place: Tensor

    @classmethod
    def of(cls, x: Tensor, place: Tensor | None = None) -> Self:
        """Over the last axis, whose places are 0, 1, ... unless given."""
        high, at = x.detach().max(-1)
        return cls(high, at if place is None else place.expand(x.shape).gather(-1, at[..., None])[..., 0])

    def merge(self, other: Self) -> Self:
        a, b = self, other
        if a.high.ndim:
            n = max(a.high.shape[-1], b.high.shape[-1])
            a, b = (type(self)(_widen(s.high, n, float("-inf")), _widen(s.place, n)) for s in (a, b))
        first = (a.high > b.high) | ((a.high == b.high) & (a.place <= b.place))
        return type(self)(torch.where(first, a.high, b.high), torch.where(first, a.place, b.place))

    @property
    def value(self) -> Tensor:
        return self.high


@dataclass(frozen=True, eq=False)
class Histogram(Statistic, by_element=True):
    """Counts between edges; the first and the last bin take what lies outside."""

    edges: tuple[float, ...]
    counts: Tensor  # [..., len(edges) - 1]

    @classmethod
    def of(cls, x: Tensor, edges: Iterable[float], weight: Tensor | None = None) -> Self:
        """Over the last axis of `x`, each element counted once or by its weight."""
        marks = tuple(float(e) for e in edges)
        inner = torch.tensor(marks[1:-1], dtype=x.dtype, device=x.device)
        slots = torch.bucketize(x.detach().contiguous(), inner, right=True)
        weight = torch.ones_like(x, dtype=torch.float64) if weight is None else _wide(weight.detach()).expand_as(x)
        counts = weight.new_zeros(*x.shape[:-1], len(marks) - 1).scatter_add_(-1, slots, weight)
        return cls(marks, counts)

    def merge(self, other: Self) -> Self:
        return type(self)(self.edges, self.counts + other.counts)

    @property
    def fits(self) -> bool:
        return self.counts.shape[-1:] == (len(self.edges) - 1,)

    @property
    def value(self) -> Tensor:
        return self.counts


@dataclass(frozen=True, eq=False)
class TopK(Statistic, by_element=True):
    """The k highest and their places; of equal ones the first places."""

    k: int
    high: Tensor  # [..., at most k], highest first
    place: Tensor

    @classmethod
    def of(cls, x: Tensor, k: int, place: Tensor | None = None) -> Self:
        """Over the last axis, whose places are 0, 1, ... unless given."""
        place = torch.arange(x.shape[-1], device=x.device) if place is None else place
        return cls._best(k, x.detach(), place.expand(x.shape))

    @classmethod
    def _best(cls, k: int, high: Tensor, place: Tensor) -> Self:
        by_place = place.argsort(dim=-1, stable=True)
        high, place = high.gather(-1, by_place), place.gather(-1, by_place)
        by_value = high.argsort(dim=-1, descending=True, stable=True)[..., :k]
        return cls(k, high.gather(-1, by_value), place.gather(-1, by_value))

    def merge(self, other: Self) -> Self:
        return self._best(self.k, torch.cat([self.high, other.high], -1), torch.cat([self.place, other.place], -1))

    @property
    def fits(self) -> bool:
        return self.high.shape == self.place.shape and self.high.shape[-1] <= self.k

    @property
    def value(self) -> Tensor:
        return self.high


@dataclass(frozen=True, eq=False)
class Cat(Statistic):
    """Pieces kept whole, in the order of their names: what a caller explicitly asked to keep."""

    pieces: Mapping[str, Tensor]

    @classmethod
    def of(cls, name: str, x: Tensor) -> Self:
        return cls({name: x.detach()})

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.pieces)

    def settings(self) -> dict[str, Any]:
        return {}

    def having(self, tensors: Mapping[str, Tensor]) -> Self:
        return type(self)(tensors)

    def __add__(self, other: Self) -> Self:
        if type(other) is not type(self):
            raise StatisticError(f"cannot merge Cat with {type(other).__name__}: kinds must agree")
        return self.merge(other)

    def merge(self, other: Self) -> Self:
        if twice := sorted(set(self.pieces) & set(other.pieces)):
            raise StatisticError(f"cannot merge Cat: both hold {twice[0]!r}; pieces need names of their own")
        return type(self)(dict(sorted({**self.pieces, **other.pieces}.items())))

    @property
    def value(self) -> list[Tensor]:
        return list(self.pieces.values())


def merged(statistics: Iterable[Statistic]) -> Statistic:
    """The sum of at least one statistic."""
    found = list(statistics)
    if not found:
        raise StatisticError("nothing to merge: give one statistic or more")
    return reduce(lambda a, b: a + b, found)


@asks
def save(path: str | Path, statistics: Mapping[str, Statistic], of: str = "") -> Path:
    """Write statistics to one safetensors file whose header tells how to build them; written beside, then renamed.

    `of` says which stack found them, where somebody may ask.
    """
    from safetensors.torch import save_file

    path = Path(path)
    whole: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    for name, stat in statistics.items():
        parts = {field: x.detach().cpu() for field, x in stat.tensors().items()}
        whole |= {f"{name}/{field}": x for field, x in parts.items()}
        header[name] = {
            "kind": type(stat).__name__,
            "settings": stat.settings(),
            "tensors": list(parts),
            "shapes": [[list(x.shape), str(x.dtype).removeprefix("torch.")] for x in parts.values()],
        }
    text = json.dumps(header)
    tensors = {name: compact(x) for name, x in whole.items()}
    if sum(x.numel() for x in whole.values()) > room(tensors):
        tensors = {name: x.contiguous().clone() for name, x in whole.items()}
    with placed(path) as beside:
        save_file(tensors, str(beside), metadata={HEADER: text, OF: of, DIGEST: _digest(of + text, tensors)})
    return path


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """A name for all that a file holds, by which one flipped bit is seen."""
    return hashlib.sha256(f"{header}|{Fitted(tensors).digest}".encode()).hexdigest()


@asks
def load(path: str | Path, of: str = "") -> dict[str, Statistic]:
    """Read what `save` wrote, unless it is said to be of another stack than `of`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            text = (told := file.metadata() or {}).get(HEADER)
            if text is None:
                raise StatisticError(f"{path} holds no heedful statistics: give a file that heedful's save() wrote")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:  # mmap's and torch's own, too
        raise StatisticError(f"cannot read statistics from {path}: {error}") from error
    made = told.get(OF, "")
    if told.get(DIGEST) != _digest(made + text, tensors):
        raise StatisticError(
            f"{path} was damaged or changed after it was saved: its checksum is another; measure again"
        )
    if of and made and made != of:
        raise StatisticError(f"{path} comes from another stack: {made}, and this one is {of}; statistics do not mix")
    try:
        return _built(path, json.loads(text), tensors)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise StatisticError(f"{path} holds no heedful statistics that fit together ({error!r})") from error


def _built(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Statistic]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, entry in header.items():
        told = zip(entry["tensors"], entry["shapes"], strict=True)
        found[name] = {field: as_it_was(tensors[f"{name}/{field}"], *shape) for field, shape in told}
    if sum(x.numel() for parts in found.values() for x in parts.values()) > room(tensors):
        raise ValueError("it speaks of far more numbers than it holds")
    out: dict[str, Statistic] = {}
    for name, parts in found.items():
        parts = {field: x.contiguous() for field, x in parts.items()}
        kind = Statistic.kinds.get(header[name]["kind"])
        if kind is None:
            raise StatisticError(f"{path} holds a {header[name]['kind']!r}: import the package that defines it first")
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in header[name]["settings"].items()}
        out[name] = Cat(parts) if kind is Cat else kind(**settings, **parts)
        if not out[name].fits:
            shapes = {field: tuple(x.shape) for field, x in parts.items()}
            raise ValueError(f"{name} is a {kind.__name__} whose parts have the shapes {shapes}")
        _ = out[name].value  # nor does what cannot tell its value
    return out
