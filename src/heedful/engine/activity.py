"""What a run says of whether a stack did anything."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.figures import printed
from heedful.engine.leaving import Before
from heedful.engine.resting import undone


class Difference(float):
    """How far outputs moved, as a share of the largest of them; a number that says so where it is shown."""

    def __repr__(self) -> str:
        return f"{float(self):.3g} of the largest output"


@dataclass(frozen=True)
class Activity:
    """Whether a stack did anything: what a run saw."""

    layers: int
    entered: tuple[int, ...]
    inactive: tuple[str, ...]
    density: dict[int, float]  # pairs computed over queries times keys, of a layer's largest call: causally about half
    kept: dict[int, tuple[int, int]]
    cache_bytes: dict[int, tuple[int, int]]  # held, and of the whole cache
    backends: dict[int, str]
    nan: bool

    @property
    def active(self) -> bool:
        return bool(self.entered) and not self.inactive

    def __str__(self) -> str:
        used = sorted(set(self.backends.values()))
        lines = [
            f"{'active' if self.active else 'NOT ACTIVE'}: {len(self.entered)} of {self.layers} layers entered"
            + (f", computed by {', '.join(used)}" if used else "")
        ]
        if self.density:
            low, high = (f"{share:.1%}" for share in (min(self.density.values()), max(self.density.values())))
            shares = low if low == high else f"{low} to {high}, by layer,"
            lines.append(f"pairs computed in the largest call: {shares} of its queries times keys")
        if self.kept:
            held, seen = (sum(x) for x in zip(*self.kept.values(), strict=True))
            lines.append(f"cache entries kept: {held} of {seen} ({held / max(1, seen):.1%})")
        if self.cache_bytes:
            held, whole = (sum(x) for x in zip(*self.cache_bytes.values(), strict=True))
            lines.append(f"cache memory: {held / 2**20:.2f} of {whole / 2**20:.2f} MiB ({held / max(1, whole):.1%})")
        lines += [f"changed nothing: {step}" for step in self.inactive]
        if self.nan:
            lines.append("NaN was seen in the output of some head")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return printed(self)


def first_output(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first numbers that a model gives, on a cache of its own where it is handed one; it keeps nothing of it."""
    with undone(Before(model).back):
        output = model(*map(_anew, args), **{name: _anew(x) for name, x in kwargs.items()})
    found = next((x for x in tensors_of(output) if x.is_floating_point()), None)
    if found is None:
        rule = "gives no floating-point numbers, alone or in tuples, lists or mappings; compare what it gives yourself"
        raise FieldError("Run.difference()", "model", type(model).__name__, rule, "a model that gives logits")
    return found


def _anew(x: Any) -> Any:
    """An argument for one forward: a cache would be written to, and the next forward go on from another text."""
    if not hasattr(x, "get_seq_length"):
        return x
    try:
        return copy.deepcopy(x)
    except RuntimeError as error:
        rule = f"cannot be copied for a second forward ({error}); fill it under torch.no_grad()"
        raise FieldError("Run.difference()", "cache", type(x).__name__, rule, None) from error


def tensors_of(given: Any) -> Iterator[Tensor]:
    """Every tensor that a call is given, or gives."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Mapping | tuple | list):
        for x in given.values() if isinstance(given, Mapping) else given:
            yield from tensors_of(x)


def density_of(call: Call) -> float:
    """The share of query-key pairs that the call's mask computes."""
    kept = total = 0
    for part in call.bands(256):
        keep = call.mask.keeps(part.pairs)
        size = len(part.queries) * len(part.keys)
        total += size
        kept += size if keep is None else int(keep.sum()) * size // max(1, keep.numel())
    return kept / max(1, total)
