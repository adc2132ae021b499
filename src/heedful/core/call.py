"""What is true of one attention call. Methods see this and the site's value, and nothing of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

import torch
from torch import Tensor

from heedful.core.errors import FieldError
from heedful.core.mask import Mask
from heedful.core.packed import Packing
from heedful.core.positions import Pairs, Positions
from heedful.core.regions import Marks, PerText, Region, Roles, bounds, by_text, coordinates, marked, numbers
from heedful.core.state import State
from heedful.core.values import replace

NO_ROLES: Roles = MappingProxyType({})


class Phase(Enum):
    """Reading the prompt, or adding one token to what the cache holds."""

    PREFILL = "prefill"
    DECODE = "decode"

    __hash__ = object.__hash__  # as a Site's

    @classmethod
    def of(cls, queries: Positions, past: bool = False) -> Phase:
        """A token alone with something before it is decoded: in its text, or in a cache that is there."""
        return cls.DECODE if queries.single and (past or (queries.first or 0) > 0) else cls.PREFILL

    @classmethod
    def named(cls, name: str | Phase) -> Phase:
        if isinstance(name, Phase):
            return name
        if name not in [p.value for p in cls]:
            raise FieldError("when()", "phase", name, "must be 'prefill' or 'decode'", "prefill")
        return cls(name)


@dataclass(frozen=True)
class DenoisingStep:
    """Where the sampling of a diffusion model has come to: step `number`, counted from 0 at pure noise, of so many."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if self.of < 1:
            raise FieldError(self, "of", self.of, "must be 1 or more steps", 50)
        if not 0 <= self.number < self.of:
            raise FieldError(self, "number", self.number, f"must be from 0 up and below {self.of}", 0)

    @property
    def share(self) -> float:
        """Which share of the steps lies behind, from 0 up and below 1."""
        return self.number / self.of


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one attention layer; inside SCORES, NORMALISE and PATTERN, one tile of it."""

    layer: int  # number of the layer among the served ones
    depth: int  # how many layers are served
    name: str  # the module's dotted name
    heads: int  # h
    kv_heads: int  # g
    queries: Positions
    keys: Positions
    scale: float  # what scores were multiplied with
    softcap: float | None = None
    phase: Phase = Phase.PREFILL
    denoising: DenoisingStep | None = None  # of a diffusion model, as the run was told; None for all others
    cross: bool = False  # keys come from another sequence than queries
    training: bool = False  # what the module that is served says of itself, as where it drops weights
    ids: Tensor | None = None  # [b n], tokens up to the whole call's last query; None: not known
    roles: Marks = field(default_factory=lambda: NO_ROLES)  # named spans of token positions
    hidden: Tensor | None = None  # [b n e], the attention block's input
    rotate: Callable[[Tensor], Tensor] | None = None  # rotates [b|1 h q d] as this call's queries and fresh keys were
    mask: Mask = field(default_factory=Mask)  # the rules for the whole call
    forward: int = 0  # how many forwards the run has seen before this one
    keep: Tensor | None = None  # [b|1, h|1, r, k]: which pairs are computed; None when all are
    rows: slice = field(default_factory=lambda: slice(None))  # the tile's rows of the call
    cols: slice | Tensor = field(default_factory=lambda: slice(None))  # the tile's columns of the call
    earlier: int = 0  # how many of the first rows are from earlier calls on the same text, to be looked at alone
    above: int = 0  # how many of the tile's first rows are only there for edits to look at, see `Method.above`
    params: Mapping[str, Tensor] = field(default_factory=dict)  # the method's learned parameters in this layer
    state: State = field(default_factory=State)  # what the method remembers
    lowest: int = 0  # number of the first layer of the list that it stands in, such as a model's decoder
    highest: int | None = None  # and of the last; None: all served layers are one list
    batch: int | None = None  # b, where it is known
    sizes: Tensor | None = None  # [b n], how many tokens each of the call's is made of; None: none were merged
    query: Tensor | None = None  # [b h q d], the whole call's, from MASK on, and at a BLOCK that asks for it
    key: Tensor | None = None  # [b g k d], like query
    value: Tensor | None = None  # [b g k d], like query
    bias: Tensor | None = None  # [b|1, h|1, q|1, k], what the model adds to the whole call's scores, from MASK on
    in_order: bool = False  # no query may know of later ones, though no mask says so: see `causal`

    @property
    def q_pos(self) -> Tensor:
        """Positions of the tile's queries, `[b|1, g|1, r]`."""
        return self.queries.position

    @property
    def k_pos(self) -> Tensor:
        """Positions of the tile's keys, `[b|1, g|1, k]`."""
        return self.keys.position

    @property
    def causal(self) -> bool:
        """Whether the model lets no query know of later ones.

        Mostly the mask says so; it does not in a decoder's cross-attention, nor once a method has opened it.
        """
        return self.in_order or self.mask.causal

    @property
    def is_text(self) -> Tensor:
        """Which of the tile's queries are text and not padding, `[b|1, 1, r]`."""
        is_filled = self.queries.is_filled
        return torch.ones_like(self.queries.index, dtype=torch.bool) if is_filled is None else is_filled

    @property
    def one_token(self) -> bool:
        """Whether it is known, without a look at a tensor, that each text reads one token here, and none is padding."""
        return self.queries.single and self.queries.whole

    @property
    def last(self) -> Tensor:
        """The row of each text's last token, `[b|1, 1]`."""
        return torch.where(self.is_text, self.queries.index, -1).argmax(-1)

    @property
    def pairs(self) -> Pairs:
        return Pairs(self.queries, self.keys, self.heads, self.rows, self.cols)

    @property
    def distance(self) -> Tensor:
        """How far behind its query each key stands, broadcastable to `[b h r k]`."""
        return self.pairs.q - self.pairs.k

    @property
    def places(self) -> Call:
        """The same without token ids and the tensors that it computes with, for what outlives it."""
        return replace(self, ids=None, query=None, key=None, value=None, bias=None, hidden=None, rotate=None)

    def capped(self, scores: Tensor) -> Tensor:
        """Scaled scores as the model bounds them."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def spread(self, x: Tensor) -> Tensor:
        """Key heads repeated for their query heads: `[b g k d]` to `[b h k d]`."""
        return x if x.shape[1] == self.heads else x.repeat_interleave(self.heads // x.shape[1], 1)

    def by_key(self, x: Tensor, total: int) -> Tensor:
        """Something of the tile's keys `[..., k]`, laid out by column of the whole call `[..., total]`."""
        out = x.new_zeros(*x.shape[:-1], total)
        out[..., self.cols] = x
        return out

    @property
    def below(self) -> int | None:
        """The layer whose stream this one goes on from; None for the first of a list of layers, such as a decoder's."""
        return self.layer - 1 if self.layer > self.lowest else None

    @property
    def last_layer(self) -> bool:
        return self.layer == self.depth - 1

    @property
    def listed(self) -> range:
        """The numbers of all layers of its list."""
        return range(self.lowest, self.depth if self.highest is None else self.highest + 1)

    @property
    def ends_list(self) -> bool:
        """Whether no later layer goes on from this one's stream, as in the last of an encoder with a decoder behind."""
        return self.layer == self.listed[-1]

    def tile(self, rows: slice, cols: slice | Tensor) -> Call:
        """The same call, seen by the queries `rows` and the keys `cols`; rows end where there are no more."""
        rows = slice(*rows.indices(len(self.queries)))
        return replace(self, queries=self.queries.take(rows), keys=self.keys.take(cols), rows=rows, cols=cols)

    def bands(self, rows: int) -> Iterator[Call]:
        """Its queries so many at a time, each time with all keys."""
        for start in range(0, len(self.queries), rows):
            yield self.tile(slice(start, start + rows), slice(0, len(self.keys)))

    def regions(self, role: str) -> tuple[Region, ...]:
        """The spans named `role` in each text of the batch; one region where all have the same."""
        found = self.roles.get(role)
        if found is None:
            known = ", ".join(sorted(self.roles)) or "none"
            raise FieldError("attach()", "roles", known, f"has no spans named {role!r}", {role: ((0, 4),)})
        if isinstance(found, PerText):
            return found.of(self.batch)
        return (found if isinstance(found, Region) else Region(found),)

    def region(self, role: str) -> Region:
        """The spans named `role`, with their grid if there is one, where all texts have the same."""
        found = set(self.regions(role))
        if len(found) > 1:
            rule = f"each text has its own {role!r}, and here all must have the same: read them one by one"
            raise FieldError("attach()", "roles", len(found), rule, {role: ((0, 4),)})
        return found.pop()

    def bounds(self, role: str) -> Tensor:
        """The starts and stops of the spans named `role`, `[b|1 spans 2]`."""
        return bounds(self.regions(role)).to(self.queries.index.device)

    def marked(self, role: str) -> Tensor:
        """Which keys stand in the spans named `role`, `[b|1, g|1, k]`."""
        return by_text(marked, self.regions(role), self.k_pos)

    def marked_queries(self, role: str) -> Tensor:
        """Which of the tile's queries stand in the spans named `role`, `[b|1, g|1, r]`."""
        return by_text(marked, self.regions(role), self.q_pos)

    def numbers(self, role: str) -> Tensor:
        """Which of the role's positions, in their order, each key is, from 0 up, `[b|1, g|1, k]`; -1 outside."""
        return by_text(numbers, self.regions(role), self.k_pos)

    def coordinates(self, role: str) -> tuple[Tensor, Tensor]:
        """Where queries `[b|1, g|1, r, dims]` and keys `[b|1, g|1, k, dims]` stand on the role's grid; -1 outside."""
        regions = self.regions(role)
        queries = by_text(coordinates, regions, self.q_pos)
        return queries, queries if self.queries.alike(self.keys) else by_text(coordinates, regions, self.k_pos)


@dataclass(frozen=True, eq=False)
class Kept:
    """What a CACHE edit leaves of a cache: which entries stay, and new keys or values for them, as after a merge."""

    keep: Tensor | None = None  # [b g k], bool; None: all stay
    key: Tensor | Packing | None = None  # [b g k d], as handed, or some of them packed; None: unchanged
    value: Tensor | Packing | None = None  # [b g k d], as handed, or some of them packed; None: unchanged


@dataclass(frozen=True, eq=False)
class Merged:
    """What an edit of RESIDUAL that merges tokens leaves: fewer of them, and what became of each."""

    stream: Tensor  # [b m e]
    to: Tensor  # [b n], which of the m each token went into; -1: it is dropped, see `kit.merging`


@dataclass(frozen=True, eq=False)
class CachedKV:
    """What a CACHE edit looks at: the cached keys and values of one layer, newest last."""

    key: Tensor  # [b g k d]
    value: Tensor  # [b g k d]
    positions: Positions
    fresh: int  # how many of them this call added
    in_row: Tensor | None = None  # [b, 1|g, k]: which are text and not padding; None: all whose position is 0 or more

    @property
    def is_filled(self) -> Tensor:
        """Which slots hold an entry, `[b g k]`."""
        shape = self.key.shape[:3]
        if self.positions.is_filled is None:
            return torch.ones(shape, dtype=torch.bool, device=self.key.device)
        return self.positions.is_filled.expand(shape)

    @property
    def is_text(self) -> Tensor:
        """Which slots hold a token of the text, `[b g k]`."""
        if self.whole:
            return self.is_filled
        text = self.is_filled & (self.positions.position >= 0)
        return text if self.in_row is None else text & self.in_row

    @property
    def whole(self) -> bool:
        """Whether it is known, without a look at a tensor, that every slot holds a token of the text."""
        return self.in_row is None and self.positions.whole
