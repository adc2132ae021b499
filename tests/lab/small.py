"""Courses so small that they are trained in a moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from heedful.authoring import Call, Method, Paper, Site, at
from heedful.laboratory.backcopy import BackCopy
from heedful.laboratory.language import Text
from heedful.laboratory.puzzles import Puzzles

PAPER = Paper("test", "A test", "Nobody", 2026)


@dataclass(frozen=True)
class Little(Text):
    """Text of which the first pieces alone are held out."""

    tokens: int = 96
    length: int = 16
    rows: int = 2
    width: int = 16
    heads: int = 2
    layers: int = 1

    def held_out(self, seed: int, times: int = 1) -> Iterator[Tensor]:
        yield next(super().held_out(seed, times)).flatten()[:512].view(-1, times * self.length)


@dataclass(frozen=True)
class Riddles(Puzzles):
    tokens: int = 384
    rows: int = 1
    width: int = 16
    heads: int = 2
    layers: int = 1


FEW = BackCopy(tokens=6 * 2 * 16, length=16, rows=2, words=12, width=16, heads=2)


class Halved(Method):
    """Scores at half their size."""

    paper = PAPER
    factor: float = 0.5

    @at(Site.SCORES)
    def shrink(self, scores: Tensor, call: Call) -> Tensor:
        return scores * self.factor


class Fails(Method):
    """Refuses every call."""

    paper = PAPER

    @at(Site.SCORES)
    def fail(self, scores: Tensor, call: Call) -> Any:
        return scores[..., :-1]
