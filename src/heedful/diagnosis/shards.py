"""One shard of a corpus, read as one process would read it: what workers do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from heedful.api import still
from heedful.core.kinds import Measure
from heedful.core.stack import Stack
from heedful.diagnosis.corpus import Shard
from heedful.diagnosis.measures import reads_text
from heedful.diagnosis.subject import Subject
from heedful.diagnosis.texts import Windows, cut, some
from heedful.diagnosis.workers import Piece


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
            return Piece(facts | {"backends": sorted(set(run.state.backends.values()))}, found)


def first_of(shards: Iterable[Shard], subject: Subject, length: int) -> Windows:
    """The windows of the first shard in which there is something to read."""
    skipped: list[str] = []
    for shard in shards:
        windows = cut(shard.read(), subject.tokenizer, length, subject.vocabulary)
        if windows.tokens:
            return windows
        skipped += windows.skipped
    return some(Windows((), None, 0, 0, tuple(skipped)))
