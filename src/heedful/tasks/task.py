"""What a task is: a frozen value that makes prompts and scores what a model makes of them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, Self, dataclass_transform

import torch
from torch import Tensor

from heedful.core.asked import after_kinds, require_fields
from heedful.core.errors import FieldError
from heedful.core.kinds.tokens import Prompt
from heedful.shown import Shown, Writing
from heedful.text_models import ALONE, require_causal


class Tokenizer(Protocol):
    """What a task needs of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Any) -> str: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Item:
    """One prompt, and what may follow it."""

    prompt: Prompt
    options: tuple[tuple[int, ...], ...] = ()  # continuations, the right one first; none: the prompt itself is graded
    cut: int | None = None  # so many tokens are read in a call of their own, before the question is known
    labels: Mapping[str, float | str] = field(default_factory=dict, hash=False)  # such as depth and length
    shown: Shown = ALONE  # what is read beside the prompt
    writes: Writing | None = None  # how the model is let write on by itself, where that is scored

    def __post_init__(self) -> None:
        if self.cut is not None and not 0 < self.cut < len(self.prompt):
            raise FieldError(self, "cut", self.cut, f"must lie inside the prompt of {len(self.prompt)} tokens", 1)
        if any(not option for option in self.options):
            raise FieldError(self, "options", self.options, "must each hold one token or more", ((1,), (2,)))

    @property
    def size(self) -> int:
        """The tokens that are read in all: the prompt's, and the longest option's."""
        return len(self.prompt) + max(map(len, self.options), default=0)

    @property
    def read(self) -> int:
        """The tokens that are read before anything is answered, an encoder's among them."""
        return len(self.prompt) + self.shown.places

    def graded(self, role: str) -> list[range]:
        """Where in a sheet's losses the spans of a role stand, for an item without options."""
        first = self.cut or 1
        return [range(start - first, stop - first) for start, stop in self.prompt.spans(role) if start >= first]


EMPTY = torch.empty(0)


@dataclass(frozen=True, eq=False)
class Sheet:
    """What a model made of one item."""

    options: tuple[Tensor, ...]  # the log-probability of each token of each option
    greedy: tuple[bool, ...]  # whether each token of the right option was the likeliest; without options: as losses
    losses: Tensor  # nats for each prompt token after the cut (else after the first); empty where there are options
    said: tuple[int, ...] = ()  # what it wrote by itself, where it was let
    # what the last token of the prompt gives to each of its picture's, where that was told; of a picture that was made,
    # what each place of it gives the words of each thing, [things rows columns], and 1 in the box of that thing
    looks: Tensor = EMPTY
    boxes: Tensor = EMPTY

    @property
    def means(self) -> tuple[float, ...]:
        """Each option's mean log-probability a token."""
        return tuple(float(option.mean()) for option in self.options)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Task(ABC):
    """Makes items and scores them. Subclass it and name the fields: they are its settings.

    Items depend on the settings, the tokenizer, `count` and `seed` alone, and the first ones of a longer series are
    the items of a shorter one.
    """

    name: ClassVar[str]  # as on the command line
    about: ClassVar[str]  # one plain sentence
    unit: ClassVar[str] = "share right"
    more_is_better: ClassVar[bool] = True
    model: ClassVar[str] = "default"  # which of those that come along it is for, where nobody names one

    def __post_init__(self) -> None:
        """Refuse fields that do not suit; by then each is known to be of the kind that its annotation names."""
        require_fields(self)

    def __init_subclass__(cls) -> None:
        if "__post_init__" in vars(cls):
            cls.__post_init__ = after_kinds(cls.__post_init__)  # type: ignore[assignment]
        dataclass(frozen=True, repr=False)(cls)

    def require(self, model: Any, tokenizer: Any) -> None:
        """Refuse a model that cannot be asked this, before anything is asked."""
        require_causal(model)

    def on(self, model: Any, tokenizer: Any) -> Self:
        """The task as this model is asked it, where that depends on the model; it has the same name and repr."""
        return self

    def items(self, tokenizer: Tokenizer, count: int, seed: int = 0) -> Sequence[Item]:
        """So many items, the same ones every time."""
        if count < 1:
            raise FieldError(self, "count", count, "must be 1 or more", 40)
        return [self.item(tokenizer, number, seed) for number in range(count)]

    def available(self, tokenizer: Tokenizer) -> int | None:
        """How many items there are; None where they are made without end."""
        return None

    @property
    def planned(self) -> int:
        """The tokens that its settings ask a prompt to have; 0 where prompts alone tell."""
        return 0

    @property
    def title(self) -> str:
        """The name in tables."""
        return self.name

    @property
    def told(self) -> tuple[str, ...]:
        """What whoever reads its scores has to know of the task."""
        return ()

    def inputs(self, model: Any, tokenizer: Any) -> Callable[[], Any] | None:
        """What calls the model once, as `attach` takes it, where its layers are not known before it has run."""
        return None

    @abstractmethod
    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        """One item of the series that the seed gives, whichever others are made."""

    @abstractmethod
    def score(self, item: Item, sheet: Sheet) -> float:
        """The item's score, in the task's unit."""

    def chance(self, item: Item) -> float | None:
        """What guessing scores on the item; None where guessing means nothing."""
        return None

    def guessed(self, item: Item, sheet: Sheet) -> float | None:
        """The same of an item of which that depends on what the model made."""
        return self.chance(item)

    def nats(self, item: Item, sheet: Sheet) -> float:
        """The mean log-probability of what is right, a token."""
        if item.options:
            return sheet.means[0]
        losses = sheet.losses
        if "answer" in item.prompt.roles:  # other tokens cannot be known
            losses = torch.cat([losses[span.start : span.stop] for span in item.graded("answer")])
        return -float(losses.mean())

    def draw(self, seed: int, number: int | None = None) -> random.Random:
        """What one item draws from, or without `number` what the whole series shares."""
        return random.Random(f"{self.name} {seed} {number}")  # seeded by text: the same in every process

    def __repr__(self) -> str:
        settings = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(settings)})"


def chosen(sheet: Sheet) -> float:
    """1 if the right option has the highest mean log-probability a token, else 0."""
    right, *others = sheet.means
    return float(all(right > other for other in others))


def recalled(sheet: Sheet) -> float:
    """1 if a greedy continuation is the right one, else 0."""
    return float(all(sheet.greedy))


class Choice(Task):
    """A task whose items each have options, of which the likeliest has to be the right one."""

    def score(self, item: Item, sheet: Sheet) -> float:
        return chosen(sheet)

    def chance(self, item: Item) -> float:
        return 1 / len(item.options)
