"""A prompt, and what drops, merges, reorders or repeats its tokens."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from heedful.core.asked import require_fields
from heedful.core.call import NO_ROLES
from heedful.core.entry import CatalogueEntry
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.regions import Roles, Span


@dataclass(frozen=True)
class Prompt:
    """Token ids and the named spans in them."""

    tokens: tuple[int, ...]
    roles: Roles = field(default_factory=lambda: NO_ROLES, hash=False)

    def __post_init__(self) -> None:
        require_fields(self)
        if not self.tokens:
            raise FieldError(self, "tokens", self.tokens, "must hold one token id or more", (1, 2))
        for role, spans in self.roles.items():
            for start, stop in spans:
                if not 0 <= start < stop <= len(self.tokens):
                    rule = f"a span lies within the {len(self.tokens)} tokens and is not empty"
                    raise FieldError(self, "roles", {role: (start, stop)}, rule, {role: ((0, 1),)})

    def __len__(self) -> int:
        return len(self.tokens)

    def spans(self, role: str) -> tuple[Span, ...]:
        if role not in self.roles:
            raise FieldError(self, "roles", sorted(self.roles), f"has no spans named {role!r}", {role: ((0, 1),)})
        return tuple(self.roles[role])

    def only(self, numbers: tuple[int, ...]) -> Prompt:
        """The prompt of these tokens alone; a span has what is left of it, and goes with the last of its tokens."""
        if list(numbers) != sorted(set(numbers)) or not numbers or numbers[0] < 0 or numbers[-1] >= len(self):
            rule = f"must be numbers of some of the {len(self)} tokens, in their order"
            raise FieldError(self, "numbers", numbers, rule, tuple(range(len(self))))

        def left(start: int, stop: int) -> Span:
            return bisect_left(numbers, start), bisect_left(numbers, stop)

        spans = {name: [left(*span) for span in spans] for name, spans in self.roles.items()}
        roles = {name: tuple((a, b) for a, b in found if a < b) for name, found in spans.items()}
        return replace(self, tokens=tuple(self.tokens[n] for n in numbers), roles=roles)

    def piece(self, start: int, stop: int) -> Prompt:
        """The prompt of these tokens alone, with the spans that lie within them; unlike `only` it cuts no span."""
        within = {name: tuple(x for x in spans if start <= x[0] and x[1] <= stop) for name, spans in self.roles.items()}
        return replace(self, roles=within).only(tuple(range(start, stop)))

    def inserted(self, place: int, other: Prompt) -> Prompt:
        """The prompt with another one before its token `place`; a span around the place grows, spans of both join."""
        if not 0 <= place <= len(self):
            raise FieldError(self, "place", place, f"must be a place from 0 to {len(self)}", len(self))
        n = len(other)
        roles = {}
        for name in (*self.roles, *(x for x in other.roles if x not in self.roles)):
            stay = [(a + n * (a >= place), b + n * (b > place)) for a, b in self.roles.get(name, ())]
            roles[name] = tuple(sorted(stay + [(a + place, b + place) for a, b in other.roles.get(name, ())]))
        return replace(self, tokens=self.tokens[:place] + other.tokens + self.tokens[place:], roles=roles)

    def reordered(self, role: str, order: tuple[int, ...]) -> Prompt:
        """The same prompt with the spans of one role in another order; what stands between them stays in place."""
        spans = self.spans(role)
        if sorted(order) != list(range(len(spans))):
            raise FieldError(
                self, "order", order, f"must name each of {len(spans)} spans once", tuple(range(len(spans)))
            )
        if any(a[1] > b[0] for a, b in pairwise(spans)):
            raise FieldError(self, "roles", {role: spans}, "must stand one after the other", {role: ((0, 4), (4, 6))})
        tokens: list[int] = []
        moved: list[Span] = []
        shifts: dict[Span, int] = {}
        done = 0
        for (start, stop), source in zip(spans, order, strict=True):
            tokens += self.tokens[done:start]
            a, b = spans[source]
            shifts[a, b] = len(tokens) - a
            moved.append((len(tokens), len(tokens) + b - a))
            tokens += self.tokens[a:b]
            done = stop
        tokens += self.tokens[done:]
        first, last = spans[0][0], spans[-1][1]

        def place(name: str, a: int, b: int) -> Span:
            """Where a span of another role is now: it moves along inside one that moves."""
            for (start, stop), shift in shifts.items():
                if start <= a and b <= stop:
                    return a + shift, b + shift
            if b <= first or a >= last or (a <= first and b >= last):
                return a, b
            rule = f"must lie outside the reordered {role!r}, inside one of them or around them all"
            raise FieldError(self, "roles", {name: (a, b)}, rule, {role: spans})

        kept = {name: tuple(place(name, *span) for span in spans) for name, spans in self.roles.items() if name != role}
        return replace(self, tokens=tuple(tokens), roles={**kept, role: tuple(moved)})


Reader = Callable[[Prompt, Method], Any]


class Tokens(CatalogueEntry, abstract=True):
    """Drops, merges, reorders or repeats the tokens of a prompt."""

    kind = "tokens"
    handed_to = "heedful.arrange()"

    def adds(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens that `arrange` may put beside those of the prompt, each as often as it may."""
        return ()

    @abstractmethod
    def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
        """The new prompt; `read(prompt, method)` runs the model and gives a reading method's answer."""
