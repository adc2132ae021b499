"""Needles in a haystack: short facts in long prose, asked for at its end."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar

from annotated_types import Interval, MinLen

from heedful.core.errors import FieldError
from heedful.core.ranges import PositiveInt, Share
from heedful.tasks._draft import Draft, length
from heedful.tasks._texts import WORDS, filler
from heedful.tasks.task import Item, Sheet, Task, Tokenizer, recalled


class _Haystack(Task):
    """Prose with codes hidden in it; the one at the depth whose turn it is gets asked for."""

    question: ClassVar[str]
    length: int = 384  # tokens of a prompt, at most
    # where the needle stands, 0 first; the items take turns
    depths: Annotated[tuple[Share, ...], MinLen(1)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    digits: PositiveInt = 5  # of a code

    def __post_init__(self) -> None:
        if self.length < (least := 64 * (1 + self.needles())):
            raise FieldError(self, "length", self.length, "must be 64 tokens a needle and 64 more", max(512, least))

    @property
    def planned(self) -> int:
        return self.length

    @abstractmethod
    def needles(self) -> int:
        """How many codes are hidden."""

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        draw, depth = self.draw(seed, number), self.depths[number % len(self.depths)]
        keys = draw.sample(WORDS, self.needles())
        codes = ["".join(draw.choices("0123456789", k=self.digits)) for _ in keys]
        facts = [f" The secret code of the {key} is {code}." for key, code in zip(keys, codes, strict=True)]
        lead = self.question.format(keys[0])
        room = self.length - sum(length(tokenizer, text) for text in (*facts, lead, " " + codes[0])) - 8
        hay = [f" {sentence}" for sentence in filler(draw, tokenizer, room)]
        spots = [round(depth * len(hay)), *(draw.randint(0, len(hay)) for _ in keys[1:])]
        draft = Draft()
        for i in range(len(hay) + 1):
            for fact, spot in zip(facts, spots, strict=True):
                if spot == i:
                    draft.add(fact, "needle" if fact == facts[0] else "distractors")
            draft.add("".join(hay[i : i + 1]))
        draft.mark("context", 0)
        cut = draft.add(lead, "question")
        return draft.item(tokenizer, [f" {codes[0]}"], cut=cut, labels={"depth": depth, "length": self.length})

    def score(self, item: Item, sheet: Sheet) -> float:
        return recalled(sheet)


class Needle(_Haystack):
    """One code hidden in prose."""

    name = "needle"
    about = "Finds one fact in long prose, by depth."
    question = "\nIn short, the code of the {0} is"  # in the fact's own words the default model is always right

    def needles(self) -> int:
        return 1

    def chance(self, item: Item) -> float:
        return 10.0**-self.digits


class NeedleMany(_Haystack):
    """Several codes hidden in prose; guessing picks one of them."""

    name = "needle_many"
    about = "Finds one fact among several of its kind in long prose, by depth."
    question = "\nQuestion: What is the secret code of the {0}?\nAnswer: The secret code of the {0} is"
    keys: Annotated[int, Interval(ge=2, le=len(WORDS))] = 4  # codes in the prose

    def needles(self) -> int:
        return self.keys

    def chance(self, item: Item) -> float:
        return 1 / self.keys
