"""Rows of a cache that are held in less memory than a tensor of them takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from typing import Any, Self

import torch
from torch import Tensor

Weave = Callable[[Tensor, Tensor], Tensor]  # what two hold of each row, `[t ...]`, in the order of all of them
Runs = tuple[tuple[tuple[int, int], ...], ...]  # of each head in turn: a source, and how many rows of it come next


class Packed(ABC):
    """Rows `[t d]` of keys or of values in a form of their own, from which they can be had back. Never changed."""

    @property
    @abstractmethod
    def form(self) -> Hashable:
        """What two of a class must share to be joined."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """How many rows there are, and how wide they are: t and d."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """The rows, `[t d]`."""

    @abstractmethod
    def take(self, which: Tensor) -> Self:
        """The rows of these numbers, in this order."""

    @abstractmethod
    def join(self, more: Self, weave: Weave) -> Self:
        """These rows and those, in the order into which `weave` brings what the two hold of each."""

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one head after another: some as they are, and others in parts of several forms, each of them in order.

    Which part a row lies in is known without a look at a tensor, so that nothing need be put in order again.
    """

    plain: Tensor  # [t ...], part 0
    counts: Sequence[int]  # how many rows each head has, of all parts together
    packed: tuple[Packed, ...] = ()  # parts 1, 2, ...
    parted: Runs = ()  # where something is packed, which part each row lies in

    @property
    def runs(self) -> Runs:
        """Of each head, which part its rows lie in."""
        return self.parted if self.packed else tuple(((0, n),) for n in self.counts)

    @property
    def parts(self) -> tuple[Tensor | Packed, ...]:
        """Part 0, and the packed ones."""
        return (self.plain, *self.packed)

    def tensor(self) -> Tensor:
        """All of them, `[t ...]`."""
        if not self.packed:
            return self.plain
        return _woven(self.runs, self.plain, *(part.tensor() for part in self.packed)).to(self.plain.dtype)

    def append(self, new: Tensor, counts: Sequence[int]) -> Rows:
        """With `new [b g n ...]`, some for each head behind its others, so that each has so many."""
        if not self.packed:
            return Rows(longer(self.plain, self.counts, new), counts)
        plain = longer(self.plain, [sum(n for part, n in head if part == 0) for head in self.parted], new)
        behind = {head: _short((*head, (0, new.shape[2]))) for head in set(self.parted)}
        return Rows(plain, counts, self.packed, tuple(behind[head] for head in self.parted))

    def put(self, those: Tensor, packed: Packed) -> Rows:
        """The same rows, of which `those [t]` are held as `packed`, in their order."""
        cut = _cut(self.runs, those)

        def left(number: int, part: Any) -> Any:
            mine = [(meant, n) for each, meant, n in chain(*cut) if each == number]
            if not any(meant for meant, _ in mine):
                return part
            places = torch.arange(len(part), device=those.device)
            pieces = zip(places.split([n for _, n in mine]), mine, strict=True)
            return _taken(part, torch.cat([places[:0], *(piece for piece, (meant, _) in pieces if not meant)]))

        plain, *parts = (left(*each) for each in enumerate(self.parts))
        alike = [i for i, part in enumerate(parts, 1) if type(part) is type(packed) and part.form == packed.form]
        number = alike[0] if alike else len(parts) + 1
        order = tuple(tuple((int(meant), n) for part, meant, n in head if meant or part == number) for head in cut)
        if alike:
            packed = parts.pop(number - 1).join(packed, partial(_woven, order))
        parts.insert(number - 1, packed)
        runs = (_short((number if meant else part, n) for part, meant, n in head) for head in cut)
        return Rows(plain, self.counts, tuple(parts), tuple(runs))

    def take(self, which: Tensor, counts: Sequence[int]) -> Rows:
        """The rows of these numbers, in this order, so many of each head."""
        if not self.packed:
            return Rows(self.plain.index_select(0, which), counts)
        runs = torch.tensor([*chain(*self.runs)], dtype=torch.long, device=which.device).view(-1, 2)
        number = runs[:, 0].repeat_interleave(runs[:, 1])
        mine = number[which]
        places = (((number == i).cumsum(0) - 1)[which[mine == i]] for i in range(len(self.packed) + 1))
        plain, *parts = map(_taken, self.parts, places)
        cut = _cut(Rows(which, counts).runs, mine)
        return Rows(plain, counts, tuple(parts), tuple(_short((part, n) for _, part, n in head) for head in cut))


def longer(held: Tensor, counts: Sequence[int], new: Tensor) -> Tensor:
    """`held [t ...]`, so many of each head, with `new [b g n ...]`, some for each head behind its others."""
    if len(set(counts)) == 1:
        heads = new.shape[:2]
        return torch.cat([held.view(*heads, counts[0], *held.shape[1:]), new], 2).flatten(0, 2)
    pairs = zip(held.split(list(counts)), new.flatten(0, 1), strict=True)
    return torch.cat([x for pair in pairs for x in pair])


def _taken(part: Any, which: Tensor) -> Any:
    """The rows of these numbers, in this order."""
    return part.index_select(0, which) if isinstance(part, Tensor) else part.take(which)  # far faster than part[which]


def _woven(runs: Runs, *sources: Tensor) -> Tensor:
    """What several sources hold of their rows, `[t ...]` each and in order, in the order of the runs."""
    order, dim = [*chain(*runs)], 0
    if len(set(runs)) == 1:  # heads are alike: all at once
        order, dim = [*runs[0]], 1
        sources = tuple(x.unflatten(0, (len(runs), len(x) // len(runs))) for x in sources)
    pieces = [iter(x.split([n for each, n in order if each == i], dim)) for i, x in enumerate(sources)]
    out = torch.cat([sources[0].narrow(dim, 0, 0), *(next(pieces[each]) for each, _ in order)], dim)
    return out.flatten(0, 1) if dim else out


def _short(runs: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Runs of one source that follow one another as one."""
    return tuple((each, sum(n for _, n in some)) for each, some in groupby(runs, lambda run: run[0]))


def _cut(runs: Runs, x: Tensor) -> list[list[tuple[int, Any, int]]]:
    """The runs, cut where `x [t]` of their rows changes, with its value."""
    values, counts = torch.unique_consecutive(x, return_counts=True)
    left = [*zip(values.tolist(), counts.tolist(), strict=True)][::-1]

    def next_ones(n: int) -> Iterator[tuple[Any, int]]:
        while n:
            value, many = left.pop()
            if many > n:
                left.append((value, many - n))
            yield value, min(n, many)
            n -= min(n, many)

    return [[(each, value, m) for each, n in head for value, m in next_ones(n)] for head in runs]


@dataclass(frozen=True, eq=False)
class Packing:
    """What a CACHE edit may give instead of new keys or values: some of them packed, and the others as they were."""

    those: Tensor  # [b g k], bool
    rows: Packed  # of `those`, head after head

    def over(self, x: Tensor) -> Tensor:
        """`x [b g k d]` with what the packed rows give back in their places."""
        out = x.clone()
        out[self.those] = self.rows.tensor().to(x.dtype)
        return out

    def among(self, heads: list[int]) -> Packing:
        """The same for these of the g heads alone."""
        chosen = torch.zeros_like(self.those)
        chosen[:, heads] = self.those[:, heads]
        return Packing(chosen, self.rows.take(chosen[self.those].nonzero().flatten()))
