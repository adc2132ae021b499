"""What a whole pattern adds up to, without keeping it: every backend can say it while it computes.

A method that needs no more than this marks its reader with `@sums` and names the parts it wants; it is called once for
each whole call, and the cost is shared with every other method that asks for the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heedful.core.errors import DefinitionError, nearest
from heedful.core.sites import Edit, F, Site, marking

if TYPE_CHECKING:
    from heedful.core.call import Call


@dataclass(frozen=True, eq=False)
class Summary:
    """Sums over the pattern of one call, after every edit, or before a `Reweight`. What was asked for is there.

    Padding queries count nowhere in `received`, `seen` and `distance`; their rows of the others mean nothing
    (`call.is_text` tells which they are). A query that may see nothing has zeros everywhere.
    """

    received: Tensor | None = None  # [b h k]: the weight that all queries together gave to each key
    seen: Tensor | None = None  # [b h k]: how many queries may see each key; comes with `received`
    entropy: Tensor | None = None  # [b h q]: of each query's weights, in nats
    peak: Tensor | None = None  # [b h q]: each query's highest weight
    place: Tensor | None = None  # [b h q]: the column of that key, the first of equals; brings `peak` along
    first: Tensor | None = None  # [b h q]: each query's weight on the text's first token, 0 where it may not see it
    distance: Tensor | None = None  # [b h m]: the weight at each distance from a query back to its key
    carried: Tensor | None = None  # [b q c]: the mean over heads, times the columns that the method's `carries` gave
    nearest: int = 0  # the distance of the first slot of `distance`; negative where keys may follow their query

    @property
    def mean(self) -> Tensor:
        """`[b h k]`: the mean weight that each key gets from the queries that may see it."""
        if self.received is None or self.seen is None:
            raise DefinitionError('the mean weight of a key needs "received", as in @sums("received")')
        return self.received / self.seen.clamp(min=1)

    @property
    def behind(self) -> Tensor | None:
        """`[b h m]`: the weight at distance 0, 1, 2, ... back; what lies ahead of the query is left out."""
        return None if self.distance is None else self.distance[..., max(0, -self.nearest) :]

    def only(self, names: tuple[str, ...]) -> Summary:
        """These parts alone, with `seen` beside `received`."""
        kept = {*names, "nearest"} | ({"seen"} if "received" in names else set())
        return Summary(**{f.name: getattr(self, f.name) for f in fields(self) if f.name in kept})

    def detached(self) -> Summary:
        """The same numbers, without the way back."""
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {name: x.detach() for name, x in parts.items() if isinstance(x, Tensor)}
        return replace(self, **tensors)

    def on(self, heads: list[int]) -> Summary:
        """The summary of some heads; what is carried stays the mean of all, which `Scoped` sees to."""
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        by_head = {name: x for name, x in parts.items() if isinstance(x, Tensor) and name != "carried"}
        chosen: dict[str, Any] = {name: x[:, heads] for name, x in by_head.items()}
        return replace(self, **chosen)


PARTS = ("received", "entropy", "peak", "place", "first", "distance", "carried")  # what can be asked for


def sums(*requested: str, penalises: bool = False) -> Callable[[F], F]:
    """Mark a method's function as a reader of the pattern's summary: it takes a `Summary` and returns a statistic.

    With `penalises` it returns a differentiable number instead, as a tensor without axes, and what it is shown has
    gradients: a loss on what keys receive is then trained on without a map, where a penalty on PATTERN needs one.
    """
    require_parts("sums", requested, PARTS)
    if not requested:
        raise DefinitionError(f"@sums() names nothing: name at least one of {', '.join(PARTS)}")
    if penalises and "place" in requested:
        raise DefinitionError('@sums("place", penalises=True): a column\'s number has no gradient; "peak" has one')

    return marking(Edit(Site.PATTERN, reads=True, sums=tuple(sorted(set(requested))), loss=penalises))


def require_parts(mark: str, requested: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Refuse what is no part of a summary."""
    for name in requested:
        if name not in known:
            there = f"{', '.join(known)}.{nearest(name, known)}"
            raise DefinitionError(f"@{mark}({name!r}): no such part; there are {there}")


class SummaryAccumulator:
    """Adds up the summary of one call, tile by tile, in plain torch; or takes it whole from a kernel."""

    def __init__(
        self, requested: frozenset[str], call: Call, carry: Tensor | None = None, learned: bool = False
    ) -> None:
        self.requested = requested
        self.call = call
        self.carry = carry  # [b k c], the columns of all who asked side by side
        self.learned = learned  # whether what it adds up to is to have gradients
        self.whole: Summary | None = None  # set by a backend that sums up by itself
        self._columns: dict[str, Tensor] = {}
        self._rows: dict[str, dict[int, Tensor]] = {}

    def fresh(self) -> SummaryAccumulator:
        """One that is asked for the same, and has added up nothing."""
        return SummaryAccumulator(self.requested, self.call, self.carry, self.learned)

    def add(self, weights: Tensor, scores: Tensor | None, call: Call, top: Tensor | None = None) -> None:
        """Take a tile: its final weights, and its masked scores where the weights are a plain softmax of them.

        Who knows the highest score of each row says it as `top`.
        """
        if not self.learned:
            weights, scores = weights.detach(), None if scores is None else scores.detach()
        mine = weights if self.call.queries.is_filled is None else weights * call.is_text[..., None]
        if "received" in self.requested:
            self._gather("received", mine.sum(-2), call)
            keep = weights.new_ones(weights.shape[-2:], dtype=torch.bool) if call.keep is None else call.keep
            keep = keep if self.call.queries.is_filled is None else keep & call.is_text[..., None]
            seen = keep.sum(-2, dtype=torch.int32).to(weights.dtype)  # no copy of the map in int64
            self._gather("seen", seen.expand(*weights.shape[:2], -1), call)
        if "distance" in self.requested:
            self._far(mine, call)
        rows: dict[str, Tensor] = {}
        if "place" in self.requested:
            rows["peak"], at = weights.max(-1)
            rows["place"] = torch.arange(len(self.call.keys), device=at.device)[call.cols][at]
        elif self.requested & {"peak", "entropy"}:
            rows["peak"] = weights.amax(-1)
        if "entropy" in self.requested:
            if self.learned:  # weights of 0 would have an endless slope
                rows["entropy"] = torch.special.entr(weights.clamp(min=torch.finfo(weights.dtype).tiny)).sum(-1)
            elif scores is None:
                rows["entropy"] = torch.special.entr(weights).sum(-1)
            else:
                rows["entropy"] = _entropy(weights, scores, rows["peak"], top)
        if "first" in self.requested:
            rows["first"] = _first(weights, call)
        if self.carry is not None:
            rows["carried"] = (weights.mean(1) @ self.carry[:, call.cols].to(weights.dtype)).mT
        for name, x in rows.items():
            self._rows.setdefault(name, {})[call.rows.start or 0] = x

    def _gather(self, name: str, x: Tensor, call: Call) -> None:
        held = self._held(name, x, len(self.call.keys))
        if isinstance(call.cols, slice):
            held[..., call.cols].add_(x)
        else:
            held.index_add_(-1, call.cols, x)

    def _held(self, name: str, like: Tensor, places: int) -> Tensor:
        """What the tiles so far add up to, `[b h places]`."""
        if name not in self._columns:
            self._columns[name] = like.new_zeros(*like.shape[:2], places)
        return self._columns[name]

    def _far(self, weights: Tensor, call: Call) -> None:
        """Add a tile's weights by their distance."""
        slots = self._held("distance", weights, self.reach)
        if not isinstance(call.cols, slice) or call.keys.first is None or call.queries.first is None:
            distance = call.distance.expand(weights.shape) - self.nearest
            # what is masked may lie outside every distance that can occur, and weighs nothing
            slots.scatter_add_(-1, distance.clamp(0, self.reach - 1).flatten(2), weights.flatten(2))
            return
        r, k = weights.shape[-2:]
        nearest = call.queries.first - (call.keys.first + k - 1) - self.nearest  # the slot of the upper right corner
        if self.call.mask.causal and nearest == 1 - r:
            found, nearest = _below(weights).flip(-1), 0
        else:
            found = _diagonals(weights).flip(-1)
        lo, hi = max(0, nearest), min(self.reach, nearest + found.shape[-1])
        if lo < hi:
            slots[..., lo:hi].add_(found[..., lo - nearest : hi - nearest])

    @cached_property
    def nearest(self) -> int:
        """The least distance that can occur."""
        return 0 if self.call.mask.causal else int(self.call.q_pos.amin() - self.call.k_pos.amax())

    @cached_property
    def reach(self) -> int:
        """How many distances can occur."""
        return max(1, int(self.call.q_pos.amax() - self.call.k_pos.clamp(min=0).amin()) - self.nearest + 1)

    def summary(self) -> Summary:
        if self.whole is not None:
            return self.whole
        rows = {name: torch.cat([x for _, x in sorted(parts.items())], -1) for name, parts in self._rows.items()}
        if not self.requested & {"peak", "place"}:
            rows.pop("peak", None)
        if "carried" in rows:
            rows["carried"] = rows["carried"].mT
        return Summary(**self._columns, **rows, nearest=self.nearest if "distance" in self.requested else 0)


def _diagonals(x: Tensor) -> Tensor:
    """The sums of the diagonals of `[b h r k]`, `[b h r+k-1]`, from the lower left corner to the upper right one."""
    r, k = x.shape[-2:]
    if k < 2 * r:
        return _skewed(torch.nn.functional.pad(x, (r - 1, r - 1)))
    # whole diagonals are read where they lie; the two corners, which have shorter ones, fit into one block
    low = x.new_ones(r, r - 1, dtype=torch.bool).tril(-1)
    ends = _diagonals(torch.where(low, x[..., : r - 1], x[..., k - r + 1 :]))
    return torch.cat([ends[..., : r - 1], _skewed(x), ends[..., r - 1 :]], -1)


def _below(x: Tensor) -> Tensor:
    """The same, `[b h k]`, of what is 0 beyond the diagonal that ends in the lower right corner."""
    r, k = x.shape[-2:]
    # cut into rows that are one longer, diagonals come to stand as columns; where one leaves its row it meets zeros
    rest = x.flatten(2)[..., k + 1 - r :].unflatten(2, (r - 1, k + 1))[..., 1:].sum(-2)
    rest[..., r - 1 :].add_(x[..., 0, : k + 1 - r])
    return rest


def _skewed(x: Tensor) -> Tensor:
    """The sums of the diagonals that begin in the first row and end in the last one."""
    x, r = x.contiguous(), x.shape[2]
    # row i read from i places further on: a diagonal comes to stand as a column
    return x.as_strided((*x.shape[:3], x.shape[3] - r + 1), (*x.stride()[:2], x.stride(2) + 1, 1)).sum(-2)


def _entropy(weights: Tensor, scores: Tensor, peak: Tensor, top: Tensor | None) -> Tensor:
    """Of softmax weights, from their scores: log-sum-exp times the row's sum, less the weights' mean score."""
    # exp(score - lse) = weight holds at the peak too, which gives the log-sum-exp without another pass
    lse = (scores.amax(-1) if top is None else top) - peak.log()
    found = lse * weights.sum(-1) - torch.einsum("bhqk,bhqk->bhq", weights, scores)
    return torch.where(peak > 0, found.clamp(min=0.0), 0.0)


def _first(weights: Tensor, call: Call) -> Tensor:
    """The weight on the key at position 0."""
    keys = call.keys
    if keys.pads == (0, 0) and keys.first is not None:
        if not 0 <= -keys.first < len(keys):
            return weights.new_zeros(weights.shape[:-1])
        return weights[..., -keys.first].clone()
    return (weights * (call.pairs.k == 0)).sum(-1)
