"""The field's synthetic tasks, all learned by one model: associative recall, selective copy, repetition and a needle.

A text begins with a token that names its task; only what can be known is graded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from heedful.adapters.wrapped import device_of
from heedful.laboratory.course import Batch, Course, Opener, Quantity
from heedful.laboratory.language import byte_model

BLANK, GO, UNGRADED = 0, 1, -100  # tokens; the four after GO name the tasks, and the last is a label
NAMES = 2
WORDS = 16  # keys, and as many values
KEYS, VALUES = torch.arange(8, 8 + WORDS), torch.arange(8 + WORDS, 8 + 2 * WORDS)
TRIED = 128  # texts of each task in the end
HARDER = 2  # times as much to remember as in training

Puzzle = tuple[Tensor, Tensor]  # tokens `[b n]` after the task's name, and which of them are graded


def _drawn(random: Generator, words: Tensor, rows: int, count: int) -> Tensor:
    """Words `[b n]`, none of them twice in a row."""
    return words[torch.rand(rows, len(words), generator=random).argsort(1)[:, :count]]


def _any(random: Generator, words: Tensor, rows: int, count: int) -> Tensor:
    return words[torch.randint(len(words), (rows, count), generator=random)]


def _asked(*parts: Tensor, last: Tensor) -> Puzzle:
    """What is told, a token that asks, and the answer, all of which is graded."""
    rows = len(last)
    ids = torch.cat([*parts, torch.full((rows, 1), GO), last], 1)
    graded = torch.zeros_like(ids, dtype=torch.bool)
    graded[:, -last.shape[1] :] = True
    return ids, graded


def recall(random: Generator, rows: int, times: int) -> Puzzle:
    """Pairs of a key and a value, then all keys again in another order, each asking for its value."""
    count = 8 * times
    keys, values = _drawn(random, KEYS, rows, count), _any(random, VALUES, rows, count)
    order = torch.rand(rows, count, generator=random).argsort(1)
    pairs, again = (
        torch.stack([k, v], 2).flatten(1) for k, v in ((keys, values), (keys.gather(1, order), values.gather(1, order)))
    )
    ids, graded = _asked(pairs, last=again)
    graded[:, -again.shape[1] :: 2] = False  # which key comes next cannot be known
    return ids, graded


def selective_copy(random: Generator, rows: int, times: int) -> Puzzle:
    """Values among blanks, then the values alone in their order."""
    count, length = 8 * times, 32 * times
    values = _any(random, VALUES, rows, count)
    places = torch.rand(rows, length, generator=random).argsort(1)[:, :count].sort(1).values
    return _asked(torch.full((rows, length), BLANK).scatter(1, places, values), last=values)


def repetition(random: Generator, rows: int, times: int) -> Puzzle:
    """Words in random order, twice; all but the first of the second time can be known, also by the distance alone."""
    words = _drawn(random, torch.cat([KEYS, VALUES]), rows, 16 * times)
    ids, graded = _asked(words, last=words)
    graded[:, -words.shape[1]] = False
    return ids, graded


def needle(random: Generator, rows: int, times: int) -> Puzzle:
    """A key and its value anywhere in a row of values, then the key."""
    length = 40 * times
    key, value = _any(random, KEYS, rows, 1), _any(random, VALUES, rows, 1)
    place = torch.randint(length - 1, (rows, 1), generator=random)
    hay = _any(random, VALUES, rows, length).scatter(1, place, key).scatter(1, place + 1, value)
    ids, graded = _asked(hay, last=torch.cat([key, value], 1))
    graded[:, -2] = False
    return ids, graded


PUZZLES: dict[str, Callable[[Generator, int, int], Puzzle]] = {
    "recall": recall,
    "copy": selective_copy,
    "repetition": repetition,
    "needle": needle,
}


def _named(name: str, puzzle: Puzzle) -> Puzzle:
    """With the token that names the task in front."""
    ids, graded = puzzle
    first = torch.full((len(ids), 1), NAMES + list(PUZZLES).index(name))
    return torch.cat([first, ids], 1), torch.nn.functional.pad(graded, (1, 0))


@dataclass(frozen=True)
class Puzzles(Course):
    """All four tasks in each batch, as many texts of one as of another; accuracy on fresh ones."""

    name: ClassVar[str] = "puzzles"
    about: ClassVar[str] = (
        "Recalls, copies and repeats random tokens; the share of the answer's tokens that are right, at 2 x with "
        "twice as much to remember."
    )
    timed: ClassVar[bool] = False  # the text's costs are its own
    tokens: int = 1_572_864
    rows: int = 8  # texts of a batch, for each task
    width: int = 64
    layers: int = 2
    heads: int = 4

    @property
    def length(self) -> int:
        return 48  # the longest, and what the others are filled up to

    @property
    def a_batch(self) -> int:
        return self.rows * len(PUZZLES) * self.length

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        about = {name: (make.__doc__ or "").partition("\n")[0] for name, make in PUZZLES.items()}
        return tuple(
            Quantity(name, about[name], "share right", True) for name in PUZZLES
        ) + tuple(
            Quantity(f"{name} at {HARDER} x", "", "share right", True)
            for name in PUZZLES
        )  # fmt: skip

    def model(self, seed: int) -> Any:
        torch.manual_seed(seed)
        words = 8 + 2 * WORDS
        return byte_model(self.width, self.layers, self.heads, self.length, words)

    def batch(self, seed: int, random: Generator) -> Batch:
        ids, labels = [], []
        for name, make in PUZZLES.items():
            tokens, graded = _named(name, make(random, self.rows, 1))
            more = (0, self.length - tokens.shape[1])
            ids.append(torch.nn.functional.pad(tokens, more, value=BLANK))
            labels.append(torch.nn.functional.pad(tokens.where(graded, UNGRADED), more, value=UNGRADED))
        return {"input_ids": torch.cat(ids), "labels": torch.cat(labels)}

    def measure(self, opened: Opener, seed: int) -> dict[str, float]:
        random = Generator().manual_seed(10_000 + seed)  # of no training
        found = {}
        with opened() as run:
            device = device_of(run.model)
            for times in (1, HARDER):
                for name, make in PUZZLES.items():
                    ids, graded = _named(name, make(random, TRIED, times))
                    best = run(input_ids=ids.to(device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
                    right = (best == ids[:, 1:])[graded[:, 1:]]
                    found[name if times == 1 else f"{name} at {HARDER} x"] = float(right.float().mean())
        return found
