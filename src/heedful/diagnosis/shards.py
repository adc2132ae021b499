"""One shard of a corpus, read as one process would read it, and the sum of many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any, Self

import torch

from heedful.api import still
from heedful.core.kinds.weights import Measure
from heedful.core.method import Stack
from heedful.core.stats import Statistic
from heedful.diagnosis.apart import MOST, Found
from heedful.diagnosis.corpus import Shard
from heedful.diagnosis.layers import by_layer, stacked, together
from heedful.diagnosis.measures import reads_text
from heedful.diagnosis.profile import Profile
from heedful.diagnosis.store import ADDED
from heedful.diagnosis.subject import Subject
from heedful.diagnosis.texts import Windows, cut, some


@dataclass(frozen=True, eq=False)
class Piece:
    """What one shard gave."""

    facts: dict[str, Any]  # counts, what was left out and why, backends
    statistics: dict[str, Statistic]


@dataclass(frozen=True, eq=False)
class Reader:
    """A model and what is measured with it; a value that can be sent to another process."""

    model: Any
    tokenizer: Any
    parts: tuple[Measure, ...]
    length: int
    batch: int
    how: Mapping[str, Any]

    @cached_property
    def _subject(self) -> Subject:
        return Subject(self.model, self.tokenizer, self.how, lambda _: None)

    @torch.no_grad()
    def __call__(self, shard: Shard) -> Piece:
        subject = self._subject
        windows = cut(shard.read(), self.tokenizer, self.length, subject.vocabulary)
        rows, roles = windows.tokens, subject.delimiters(self.batch)
        mine = [(n, part) for n, part in enumerate(self.parts) if reads_text(part)]
        facts = {name: getattr(windows, name) for name in ("texts", "left_out")}
        facts |= {"windows": len(rows), "tokens": sum(map(len, rows)), "skipped": list(windows.skipped)}
        if not rows or not mine:
            return Piece(facts | {"backends": []}, {})
        with still(self.model), subject.attach(Stack(tuple(part for _, part in mine))) as run:
            for i in range(0, len(rows), self.batch):
                if roles is not None:
                    run.roles = {"delimiters": roles.spans(rows[i])}
                subject.read(run, rows[i : i + self.batch])
            found = {f"{mine[n][0]}.{name}.{layer}": x for (n, name, layer), x in run.state.statistics.items()}
            return Piece(facts | {"backends": sorted(set(run.state.backends.values()))}, stacked(found))


@dataclass(frozen=True, eq=False)
class Sums:
    """The first shards of a corpus together. A value, so that whoever is interrupted holds those of whole shards."""

    facts: Mapping[str, Any] = field(
        default_factory=lambda: {**dict.fromkeys((*ADDED, "shards", "unread"), 0), "skipped": [], "backends": []}
    )
    apart: Mapping[int, Found] = field(default_factory=dict)  # in parts, each of every fifth shard; layers stacked

    @classmethod
    def of(cls, earlier: Profile) -> Self:
        """What was saved of them."""
        parts = map(stacked, earlier.in_parts if earlier.statistics else ())
        return cls({name: earlier.facts[name] for name in cls().facts}, dict(enumerate(parts)))

    def plus(self, piece: Piece) -> Self:
        """These and the next one."""
        told, more, found = self.facts, piece.facts, piece.statistics
        facts = {
            **{name: told[name] + more[name] for name in (*ADDED, "skipped")},
            "backends": sorted({*told["backends"], *more["backends"]}),
            "shards": told["shards"] + 1,
            "unread": told["unread"] + (not found),
        }
        if not found:
            return replace(self, facts=facts)
        unit = (told["shards"] - told["unread"]) % MOST
        return replace(self, facts=facts, apart={**self.apart, unit: together(self.apart.get(unit, {}), found)})

    @property
    def whole(self) -> Found:
        """All parts together, layer by layer."""
        whole: Found = reduce(together, self.apart.values(), {})
        return by_layer(whole)

    @property
    def parts(self) -> tuple[Found, ...]:
        """Each part, layer by layer; none where there is but one."""
        return tuple(map(by_layer, self.apart.values())) if len(self.apart) > 1 else ()


def first_of(shards: Iterable[Shard], subject: Subject, length: int) -> Windows:
    """The windows of the first shard in which there is something to read."""
    skipped: list[str] = []
    for shard in shards:
        windows = cut(shard.read(), subject.tokenizer, length, subject.vocabulary)
        if windows.tokens:
            return windows
        skipped += windows.skipped
    return some(Windows((), None, 0, 0, tuple(skipped)))
