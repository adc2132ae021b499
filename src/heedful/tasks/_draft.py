"""A prompt written piece by piece: spans are named in characters and become tokens at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import takewhile

from heedful.core.kinds.tokens import Prompt
from heedful.tasks.task import Item, Tokenizer


def opening(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])


class Draft:
    """Text so far, and the spans in it."""

    def __init__(self) -> None:
        self.text = ""
        self._spans: dict[str, list[tuple[int, int]]] = {}

    def add(self, text: str, *roles: str) -> int:
        """Write on, and give the place where the new text begins."""
        start = len(self.text)
        self.text += text
        for role in roles:
            self.mark(role, start)
        return start

    def mark(self, role: str, start: int) -> None:
        """What was written since `start` is a span of the role."""
        self._spans.setdefault(role, []).append((start, len(self.text)))

    def item(
        self,
        tokenizer: Tokenizer,
        options: Iterable[str] = (),
        *,
        cut: int | None = None,
        labels: Mapping[str, float | str] | None = None,
    ) -> Item:
        """The item: the text encoded as a whole, so that its tokens are those of any other user of the tokenizer."""
        before, whole = opening(tokenizer), tokenizer.encode(self.text, add_special_tokens=False)

        @cache
        def token(place: int) -> int:
            start = tokenizer.encode(self.text[:place], add_special_tokens=False)
            # A token that reaches over the place belongs to what follows.
            same = takewhile(lambda pair: pair[0] == pair[1], zip(start, whole, strict=False))
            return len(before) + sum(1 for _ in same)

        def follow(option: str) -> tuple[int, ...]:
            both = tokenizer.encode(self.text + option, add_special_tokens=False)
            if both[: len(whole)] == whole:
                return tuple(both[len(whole) :])
            return tuple(tokenizer.encode(option, add_special_tokens=False))

        roles = {role: tuple((token(a), token(b)) for a, b in spans) for role, spans in self._spans.items()}
        return Item(
            Prompt((*before, *whole), roles),
            tuple(follow(option) for option in options),
            None if cut is None else token(cut),
            dict(labels or {}),
        )


def length(tokenizer: Tokenizer, text: str) -> int:
    """How many tokens a text takes, roughly so within a longer one."""
    return len(tokenizer.encode(text, add_special_tokens=False))
