"""Language-model loss: nats a token on prose, by how much text came before."""

from __future__ import annotations

from heedful.core.errors import FieldError
from heedful.core.kinds.tokens import Prompt
from heedful.core.ranges import PositiveInt
from heedful.tasks._draft import opening
from heedful.tasks._texts import articles
from heedful.tasks.task import Item, Sheet, Task, Tokenizer


class LossByPosition(Task):
    """Each item reads the beginning of a text of its own in one call and is graded on the part that follows it."""

    name = "loss"
    about = "Language-model loss on Python's own help texts, by position."
    unit = "nats a token"
    more_is_better = False
    length: int = 512  # tokens of a text
    parts: PositiveInt = 4  # of a text; the items take turns

    def __post_init__(self) -> None:
        if self.length < 8 * self.parts:
            raise FieldError(self, "length", self.length, "must be 8 tokens a part or more", max(512, 8 * self.parts))

    @property
    def planned(self) -> int:
        return self.length

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        part = number % self.parts
        draw, before = self.draw(seed, number), opening(tokenizer)
        words = " ".join(draw.sample(articles(), len(articles()))).split(" ")
        at = draw.randrange(1000)
        told = " ".join(words[at : at + 2 * self.length])  # two words for each token are enough everywhere
        tokens = (*before, *tokenizer.encode(told, add_special_tokens=False))[: self.length]
        if len(tokens) < self.length:
            raise FieldError(self, "length", self.length, f"the help texts give {len(tokens)} tokens", len(tokens) // 2)
        start, stop = (self.length * i // self.parts for i in (part, part + 1))
        return Item(Prompt(tokens[:stop]), cut=start or None, labels={"position": start, "length": self.length})

    def score(self, item: Item, sheet: Sheet) -> float:
        return float(sheet.losses.mean())
