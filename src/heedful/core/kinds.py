"""What stands beside the attention call: the prompt, the next-token logits, the weights, and a model taught anew."""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

from torch import Tensor

from heedful.core.asked import require_fields
from heedful.core.call import NO_ROLES
from heedful.core.entry import CatalogueEntry, FitContext, Layer
from heedful.core.errors import FieldError, StatisticError
from heedful.core.figures import Description
from heedful.core.fitted import Fitted
from heedful.core.method import Method, Part, Stack, as_stack
from heedful.core.regions import Roles, Span
from heedful.core.sites import Site

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Loaded(NamedTuple):
    """A model in eval mode, its tokenizer (or processor; None where there is none), and which weights these are."""

    model: PreTrainedModel
    tokenizer: Any
    name: str


def model_of(given: nn.Module | Loaded) -> nn.Module:
    """The model itself, where it is given as `heedful.models` loads it."""
    return given.model if isinstance(given, Loaded) else given


@runtime_checkable
class Tokenizer(Protocol):
    """What makes token ids of a text, and texts of ids: a tokenizer of transformers, or a processor."""

    def __call__(self, text: Any, /, **how: Any) -> Any: ...

    def batch_decode(self, ids: Any, /) -> list[str]: ...


def words_of(reader: Any) -> Any:
    """The tokenizer itself, where a processor holds it."""
    return getattr(reader, "tokenizer", reader)


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


NOTHING: Mapping[str, Any] = MappingProxyType({})
Read = Mapping[str, Mapping[Part, Any]]  # of each variant, what its reading methods have to tell of the last forward
NOTHING_READ: Read = MappingProxyType({})


class Decode(CatalogueEntry, abstract=True):
    """Combines or changes next-token logits, of which it may read what made them."""

    kind = "decode"
    handed_to = "heedful.decode()"
    # whether it combines what a diffusion model predicts too; the `role` of one that has such names places of a picture
    denoises: ClassVar[bool] = False

    def ready(self, prompt: Prompt, read: Reader) -> Decode:
        """The step that knows the prompt, where variants depend on what the model reads of it; the same otherwise."""
        return self

    @abstractmethod
    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        """The runs whose logits are combined, by name; the first one is the prompt that is continued."""

    @abstractmethod
    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        """The logits `[vocabulary]` to decode from, given those of each variant and what its readers read of them."""


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """One layer's projections, head by head, whatever modules hold them."""

    q: Tensor  # [h d e]
    k: Tensor  # [g d e]
    v: Tensor  # [g d e]
    o: Tensor  # [e h d]
    q_bias: Tensor | None = None  # [h d]
    k_bias: Tensor | None = None  # [g d]
    v_bias: Tensor | None = None  # [g d]
    o_bias: Tensor | None = None  # [e]
    stream: Tensor | None = None  # [e], a constant that an edit adds to the stream as it leaves the layer

    @property
    def heads(self) -> int:
        return self.q.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[0]

    def keep_groups(self, groups: tuple[int, ...]) -> HeadWeights:
        """Only these key heads, each with its query heads."""
        size = self.heads // self.kv_heads
        heads = [g * size + i for g in groups for i in range(size)]
        kv = list(groups)

        def pick(x: Tensor | None, rows: list[int]) -> Tensor | None:
            return None if x is None else x[rows]

        return HeadWeights(
            self.q[heads], self.k[kv], self.v[kv], self.o[:, heads],
            pick(self.q_bias, heads), pick(self.k_bias, kv), pick(self.v_bias, kv), self.o_bias, self.stream,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a model knows of its tokens: the vector each comes in as, and the one its logit is a product with."""

    embedding: Tensor  # [v e]
    unembedding: Tensor  # [v e]


class Surgery(CatalogueEntry, abstract=True):
    """Edits weights offline."""

    kind = "surgery"
    handed_to = "heedful.operate()"

    @abstractmethod
    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        """The layer's new weights; the same object where nothing changes."""

    def require_depth(self, depth: int) -> None:
        """Refuse a model of so many layers, where others are named; `operate` would never see those."""


class Weights(CatalogueEntry, abstract=True):
    """Measures a model's weights alone: `found = heedful.fit(it, model, ())`, then `found.describe()`."""

    kind = "weights"
    handed_to = "heedful.fit()"
    fitted: Fitted | None = field(default=None, kw_only=True)

    @property
    def found(self) -> Fitted:
        """What was fitted; refused where nothing was."""
        if self.fitted is None:
            raise StatisticError(f"{self!r} has seen no weights: heedful.fit({type(self).__name__}(), model, ())")
        return self.fitted

    @abstractmethod
    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]] = ()) -> Self:
        """The same with what it found as `fitted`."""

    @abstractmethod
    def describe(self) -> Description:
        """What of it is worth a figure, a role or a sentence."""


Measure = Part | Weights


@dataclass(frozen=True)
class Progress:
    """How far something is that takes its time."""

    stage: str  # what is being done, such as "layers" or "whole" of a conversion
    done: int  # steps of this stage, or tokens, shards, answers
    total: int
    note: str = ""


Report = Callable[[Progress], None]


class Conversion(CatalogueEntry, abstract=True):
    """Teaches a copy of a model another attention: `run = heedful.fit(it, model, batches)` is that copy under it.

    First each layer by itself, shown what the model's own layer is shown; then the copy as a whole.
    """

    kind = "conversion"
    handed_to = "heedful.fit()"
    target: Part | Stack = field(default_factory=Stack)  # what acts in the copy, in the layers that it is for
    surgery: Surgery | None = None  # what is done to the copy's weights before: fewer key heads, for instance
    layer_epochs: int = 1  # passes over the batches in which each layer learns by itself
    epochs: int = 1  # passes in which the copy learns as a whole
    layer_rate: float = 1e-3  # Adam's learning rate for single layers
    rate: float = 1e-4  # Adam's learning rate for the whole
    features: float = 0.0  # weight of staying near the model's stream while the whole is taught; 0: not asked for

    def __post_init__(self) -> None:
        for name in ("layer_epochs", "epochs"):
            if getattr(self, name) < 0:
                raise FieldError(self, name, getattr(self, name), "must be 0 or more passes", 1)
        for name in ("layer_rate", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise FieldError(self, name, getattr(self, name), "must be above 0 and finite", 1e-4)
        if not 0 <= self.features < math.inf:
            raise FieldError(self, "features", self.features, "must be 0 or more, and finite", 0.1)
        if any(e.site is Site.HIDDEN and not e.reads for m in as_stack(self.target).methods for e in m.edits):
            rule = "edits HIDDEN, and what a layer is shown is the model's own while it learns by itself"
            raise FieldError(self, "target", self.target, rule, "GatedHeads(fine_tune=True)")

    @abstractmethod
    def of_layer(self, found: Tensor, wanted: Tensor) -> Tensor:
        """How far what a layer's attention gives is from what the model's own gives, `[n e]` each: a number."""

    @abstractmethod
    def of_whole(self, found: Tensor, wanted: Tensor) -> Tensor:
        """How far logits are from the model's own, `[n v]` each: a number."""

    @abstractmethod
    def of_stream(self, found: Tensor, wanted: Tensor) -> Tensor:
        """How far the stream after a layer is from the model's own, `[n e]` each: a number."""
