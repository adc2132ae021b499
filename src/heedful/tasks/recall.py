"""Associative recall: what stood beside this the last time?"""

from __future__ import annotations

import random
from typing import Annotated

from annotated_types import Ge, Interval

from heedful.core.errors import FieldError
from heedful.core.kinds.tokens import Prompt
from heedful.tasks._draft import Draft, opening
from heedful.tasks._texts import WORDS
from heedful.tasks.task import Item, Sheet, Task, Tokenizer, recalled


class _Pairs(Task):
    """Words, each with a number."""

    pairs: Annotated[int, Interval(ge=2, le=len(WORDS))] = 8
    digits: Annotated[int, Interval(ge=1, le=18)] = 3  # of a number

    def __post_init__(self) -> None:
        if 10**self.digits < self.pairs:
            raise FieldError(self, "digits", self.digits, "must give each pair a number of its own", 3)

    def description(self, draw: random.Random) -> list[tuple[str, str]]:
        """The pairs, in order."""
        numbers = draw.sample(range(10**self.digits), self.pairs)
        return [(word, f"{n:0{self.digits}}") for word, n in zip(draw.sample(WORDS, self.pairs), numbers, strict=True)]

    def chance(self, item: Item) -> float:
        return 1 / self.pairs


class KeyValueRecall(_Pairs):
    """A list of `key: value` lines and a key again; guessing picks one of the values."""

    name = "recall"
    about = "Recalls the value of one key from a list."

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        draw = self.draw(seed, number)
        pairs, asked = self.description(draw), draw.randrange(self.pairs)
        draft = Draft()
        for i, (key, value) in enumerate(pairs):
            draft.add(f"{key}:")
            draft.add(f" {value}", *["needle"] * (i == asked))
            draft.add("\n")
        draft.mark("context", 0)
        key, value = pairs[asked]
        cut = draft.add(f"{key}:", "question")
        return draft.item(tokenizer, [f" {value}"], cut=cut, labels={"depth": asked / (self.pairs - 1)})

    def score(self, item: Item, sheet: Sheet) -> float:
        return recalled(sheet)


class MultiQueryRecall(_Pairs):
    """The same lines twice, the second time in another order: each value can then be known from its key."""

    name = "multi_query"
    about = "Recalls the values of many keys, one after the other (MQAR in words)."

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        draw = self.draw(seed, number)
        pairs = self.description(draw)
        again = draw.sample(pairs, self.pairs)
        draft = Draft()
        for role, rows in (("needle", pairs), ("answer", again)):
            start = len(draft.text)
            for key, value in rows:
                draft.add(f"{key}:")
                draft.add(f" {value}", role)
                draft.add("\n")
            draft.mark("context" if role == "needle" else "question", start)
        return draft.item(tokenizer, cut=start, labels={"pairs": self.pairs})

    def score(self, item: Item, sheet: Sheet) -> float:
        right = [all(sheet.greedy[i] for i in value) for value in item.graded("answer")]
        return sum(right) / len(right)


class Induction(Task):
    """Tokens in random order, twice; all but the first of the second time can be known. Guessing picks one of them."""

    name = "induction"
    about = "Predicts random tokens that came in this order before."
    length: Annotated[int, Ge(2)] = 64  # tokens that are repeated

    @property
    def planned(self) -> int:
        return 2 * self.length

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        pool = sorted({token for word in WORDS for token in tokenizer.encode(f" {word}", add_special_tokens=False)})
        enough = pool * -(-self.length // len(pool))  # all different where there are as many
        before, row = opening(tokenizer), self.draw(seed, number).sample(enough, self.length)
        start = len(before) + self.length
        prompt = Prompt(
            (*before, *row, *row), {"context": ((len(before), start),), "answer": ((start + 1, start + self.length),)}
        )
        return Item(prompt, cut=start, labels={"length": self.length})

    def score(self, item: Item, sheet: Sheet) -> float:
        (places,) = item.graded("answer")
        right = [sheet.greedy[i] for i in places]
        return sum(right) / len(right)

    def chance(self, item: Item) -> float:
        return 1 / len({item.prompt.tokens[i] for i in range(*item.prompt.spans("context")[0])})
