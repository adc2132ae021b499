"""Tasks from a user's own documents: questions on them, choices, or plain text whose loss is measured."""

from __future__ import annotations

import hashlib
import random
import re
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from heedful.core.errors import FieldError
from heedful.core.kinds.tokens import Prompt
from heedful.tasks._draft import Draft, opening
from heedful.tasks._rows import Asked
from heedful.tasks.task import Choice, Item, Sheet, Task, Tokenizer, recalled

CHARACTERS = 4_000_000  # of texts, drawn from all, that are cut into windows
PORTION = re.compile(r".{1,4000}(?=\s|$)|.{1,4000}", re.DOTALL)  # a tokenizer warns of more than its model takes


class Given(Task):
    """Items that somebody has, in an order that the seed draws: a file may be sorted, and asking may stop early."""

    source: str = ""  # where they were read
    rows: tuple[Any, ...] = ()
    left_out: tuple[str, ...] = ()  # what could not be read there, and why

    @property
    def title(self) -> str:
        return Path(self.source).name

    def available(self, tokenizer: Tokenizer) -> int:
        return len(self.rows)

    def place(self, tokenizer: Tokenizer, number: int, seed: int) -> int:
        """Which of the items is asked at that place of the series."""
        return _order(self.available(tokenizer), f"{self.name} {seed}")[number]

    def __repr__(self) -> str:
        digest = hashlib.sha256(repr(self.rows).encode()).hexdigest()[:8]
        return f"{type(self).__name__}({self.source!r}, {len(self.rows)} items, #{digest})"


def unbound(task: Task) -> FieldError:
    """Why a task makes no items yet."""
    rule = "makes items for one model alone, which was not named"
    return FieldError(task, "on", None, rule, "task.on(model, tokenizer)")


@lru_cache(maxsize=64)
def _order(count: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def asked(row: Asked, tokenizer: Tokenizer) -> Item:
    """The context, then the question; where the answer stands in the context word for word, it is the needle."""
    draft, cut = Draft(), None
    if row.context:
        before, found, after = row.context.partition(row.options[0])
        draft.add(before)
        if found:
            draft.add(found, "needle")
        draft.add(after)
        draft.mark("context", 0)
        cut = draft.add("\n\n")
    draft.add(f"Question: {row.question}\nAnswer:", "question")
    return draft.item(tokenizer, [f" {option}" for option in row.options], cut=cut)


class OwnQuestions(Given):
    """Questions of the user's own, each with the answer that a greedy continuation has to give word for word."""

    name = "own questions"
    about = "Answers questions of your own, word for word."

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        return asked(self.rows[self.place(tokenizer, number, seed)], tokenizer)

    def score(self, item: Item, sheet: Sheet) -> float:
        return recalled(sheet)

    def chance(self, item: Item) -> float:
        return 0.0


class OwnChoices(Given, Choice):
    """Questions of the user's own with options, of which the likeliest has to be the right one."""

    name = "own choices"
    about = "Chooses the right answer to questions of your own."

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        return asked(self.rows[self.place(tokenizer, number, seed)], tokenizer)


class OwnText(Given):
    """Plain text of the user's own in windows: the first half is read in one call, the second half is graded."""

    name = "own text"
    about = "Language-model loss on text of your own, on the second half of each window."
    unit = "nats a token"
    more_is_better = False
    length: Annotated[int, Ge(16)] = 512  # tokens of a window; a shorter text is one window

    def available(self, tokenizer: Tokenizer) -> int:
        return len(_windows(self.rows, self.length, tokenizer))

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        tokens = _windows(self.rows, self.length, tokenizer)[self.place(tokenizer, number, seed)]
        return Item(Prompt(tokens), cut=len(tokens) // 2, labels={"length": len(tokens)})

    def score(self, item: Item, sheet: Sheet) -> float:
        return float(sheet.losses.mean())

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, length={self.length})"


@lru_cache(maxsize=8)
def _windows(rows: tuple[str, ...], length: int, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Every text in pieces of that length; an end of less than an eighth of one is left out."""
    before, found = tuple(opening(tokenizer)), []
    texts = [rows[i] for i in _order(len(rows), "texts")]
    inner = length - len(before)
    for text, size in zip(texts, accumulate(map(len, texts)), strict=True):
        parts = PORTION.findall(text[: 2 * CHARACTERS])
        tokens = tuple(token for part in parts for token in tokenizer.encode(part, add_special_tokens=False))
        pieces = [tokens[i : i + inner] for i in range(0, len(tokens), inner)]
        whole = [(*before, *piece) for piece in pieces if 8 * len(piece) >= inner or len(pieces) == 1]
        found += [window for window in whole if len(window) > 1]
        if size >= CHARACTERS:
            break
    return tuple(found)
