"""What a method remembers, by how long it lasts: this forward, the run, or as long as the cache of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from heedful.core.errors import FieldError, shape_of


@dataclass(frozen=True, eq=False)
class ByIndex:
    """A tensor `[b ...]` that says something of each token; `dim` counts them by index, as in the padded row."""

    x: Tensor
    dim: int

    def crop(self, left: int) -> ByIndex:
        """What it says of the first `left` tokens."""
        return ByIndex(self.x.narrow(self.dim, 0, min(left, self.x.shape[self.dim])), self.dim)


@dataclass(frozen=True, eq=False)
class Until(ByIndex):
    """Of how many tokens of each text `[b]` something kept was made; -1, which is none, once some are cropped."""

    dim: int = 0

    def crop(self, left: int) -> Until:
        return Until(self.x.masked_fill(self.x > left, -1))


Note = Tensor | ByIndex


class Key(NamedTuple):
    """Whose it is: the parts of a stack that edit, the part itself, and the module."""

    editors: tuple[str, ...] = ()
    part: str = ""
    module: str = ""


class Shelf:
    """What methods keep with one cache. Where other edits are kept than before, what is out of date goes."""

    def __init__(self, settle: Callable[[Shelf], None] | None = None) -> None:
        self._settle = settle  # puts it with the cache, once there is something to carry
        self._editors: tuple[str, ...] = ()  # of the stack that last kept something and does not only read
        self._kept: dict[Key, dict[str, Note]] = {}
        self.instead: dict[int, str] = {}  # layers of the cache that hold what the model's own attention cannot read
        self.served: int | None = None  # the one among them whose next update is a run's

    def of(self, key: Key) -> dict[str, Note]:
        """What was kept under a key, for reading."""
        return self._kept.get(key, {})

    def mine(self, key: Key) -> dict[str, Note]:
        """The same for writing."""
        if key.editors and key.editors != self._editors:
            self._editors = key.editors
            self._kept = {k: kept for k, kept in self._kept.items() if k.editors in ((), key.editors)}
        self._go_along()
        return self._kept.setdefault(key, {})

    def _go_along(self) -> None:
        if self._settle is not None:
            settle, self._settle = self._settle, None
            settle(self)

    def takes(self, number: int, what: str, tokens: int) -> bool:
        """Let layer `number` of the cache take up `what` in place of the model's keys and values, unless the `tokens`
        that it has seen are held otherwise."""
        if tokens and self.instead.get(number) != what:
            return False
        self._go_along()
        self.instead[number], self.served = what, number
        return True

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is kept."""
        for kept in self._kept.values():
            yield from (x.x if isinstance(x, ByIndex) else x for x in kept.values())

    # what happens to the cache happens to it

    def choose(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Hold what `pick` makes of every tensor's first dimension, the texts."""
        for kept in self._kept.values():
            for name, x in kept.items():
                kept[name] = replace(x, x=pick(x.x)) if isinstance(x, ByIndex) else pick(x)

    def crop(self, left: int) -> None:
        """Only the first `left` tokens of every row stay."""
        if not left:
            self._kept, self.instead = {}, {}
        for kept in self._kept.values():
            kept.update({name: x.crop(left) for name, x in kept.items() if isinstance(x, ByIndex)})


class Notes(MutableMapping[str, Tensor]):
    """What one method keeps with the cache of the text, in one layer: tensors `[b ...]` by name.

    They go where the cache goes: beams reorder their rows, copies of the cache have copies of them, and a new text
    begins without any. Write a `ByIndex` where cropping the cache should crop them too, and an `Until` beside what
    cropping makes untrue. Without a cache they last for the call.
    """

    def __init__(self, shelf: Shelf | None = None, key: Key | None = None, batch: int | None = None) -> None:
        self._shelf = Shelf() if shelf is None else shelf
        self._key, self._batch = key or Key(), batch

    def __getitem__(self, name: str) -> Tensor:
        found = self._shelf.of(self._key)[name]
        return found.x if isinstance(found, ByIndex) else found

    def __setitem__(self, name: str, x: Note) -> None:
        tensor = x.x if isinstance(x, ByIndex) else x
        if not isinstance(tensor, Tensor) or not tensor.ndim or self._batch not in (None, len(tensor)):
            rule = f"must be a tensor [b ...] with the batch first, of {self._batch} texts, for beams to reorder it"
            raise FieldError("call.state", f"cache[{name!r}]", shape_of(tensor), rule, "x.expand(call.batch, ...)")
        self._shelf.mine(self._key)[name] = x

    def __delitem__(self, name: str) -> None:
        self[name]
        del self._shelf.mine(self._key)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shelf.of(self._key))

    def __len__(self) -> int:
        return len(self._shelf.of(self._key))


@dataclass(frozen=True, eq=False)
class State:
    """What one method remembers. It sees its own alone."""

    # for all layers of this one forward of the whole model, and behind an encoder that ran before it: of what is kept
    # there, tensors that have a row for each text, in mappings and lists too, are handed on in the decoder's rows
    forward: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)  # for this layer, whatever the text, until the run forgets
    cache: Notes = field(default_factory=Notes)  # for this layer, as long as the cache of the text
