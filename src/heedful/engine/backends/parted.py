"""Calls whose queries see few keys, wherever these stand: parts of them are gathered, and each is a text of its own.

So one call of a kernel has them all, and a part costs its own pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.mask import Causal, Mask
from heedful.core.positions import Positions, spread_heads
from heedful.core.regions import PerText
from heedful.core.rules import Parts
from heedful.core.sites import Site
from heedful.core.values import replace
from heedful.engine.again import recomputed
from heedful.engine.attention_call import AttentionCall
from heedful.engine.needs import Needs

TILE_BYTES = 8 << 20  # scores of one tile, or of parts at once: a few of them fit into a last-level cache
KEPT = 8  # as many of these the way back may find kept, of parts

Tensors = tuple[Tensor, Tensor, Tensor]  # queries, keys and values
Compute = Callable[[AttentionCall, Call, Tensor, Tensor, Tensor], Tensor]


def parts_of(job: AttentionCall, shared: bool = False) -> tuple[Parts, ...]:
    """The parts that say all that a call leaves out; none where it is to be computed as its tokens stand.

    Where queries are `shared` by parts, only who knows the sums of rows can put these together.
    """
    call, plan = job.call, job.plan
    told = (job.bias, job.sink, job.accumulator, call.keys.is_filled, call.sizes)
    if any(x is not None for x in told) or job.dropout or call.earlier or plan.reweights:
        return ()
    if (job.needs or Needs()).transformed or any(isinstance(role, PerText) for role in call.roles.values()):
        return ()
    sites = (Site.SCORES, Site.NORMALISE, Site.PATTERN)
    steps = [step for site in sites for step in plan.tiles(site) if not step.edit.weighs]
    if not all(step.method.anywhere for step in steps):
        return ()
    rules = call.mask.acting(call.queries, call.keys)
    narrow = [rule for rule in rules if not isinstance(rule, Causal)]
    parts = narrow[0].parts() if len(narrow) == 1 else ()
    if len(rules) > 1 and not all(part.past for part in parts):
        return ()
    if any(part.shared != shared or (steps and _by_head(part)) for part in parts):
        return ()
    return parts


def in_parts(job: AttentionCall, parts: tuple[Parts, ...], compute: Compute, tensors: Tensors) -> Tensor:
    """The heads of a call, computed part by part."""
    needs, found = job.needs or Needs(), []
    folds = [fold for part in parts for fold in folded(part, tensors)]
    for fold in folds:

        def part(job: AttentionCall, fold: Fold = fold) -> Tensor:
            call, *given = fold.gathered(job.call, tensors)
            return compute(job, call, *given)

        found.append(recomputed(part, job) if needs.gradients and len(folds) > KEPT else part(job))
    return spread_out(folds, found, tensors[0].shape[2])


def folded(part: Parts, tensors: Tensors) -> Iterator[Fold]:
    """The parts, as many at once as the bytes of a tile allow."""
    texts, heads = tensors[0].shape[:2]
    each = 4 * texts * heads * part.rows.shape[-1] * part.cols.shape[-1]
    step = max(1, TILE_BYTES // max(1, each))
    for start in range(0, part.rows.shape[2], step):
        yield Fold(part, slice(start, start + step), texts, heads)


def spread_out(folds: list[Fold], found: list[Tensor], queries: int) -> Tensor:
    """What queries have in their parts, `[b h q e]` as the call has them; zeros for who is in none."""
    texts, heads, width = folds[0].texts, folds[0].heads, found[0].shape[-1]
    at = torch.cat([fold.numbers(fold.rows, heads, queries).flatten() for fold in folds])
    rows = torch.cat([x.reshape(-1, width) for x in found])
    out = rows.new_zeros(texts * heads * queries + 1, width).index_copy(0, at, rows)  # the last is for nobody
    return out[:-1].view(texts, heads, queries, width)


def _by_head(part: Parts) -> bool:
    """Whether heads have parts of their own."""
    return any(x.shape[1] > 1 for x in (part.rows, part.cols))


@dataclass(frozen=True, eq=False)
class Fold:
    """Parts as texts: `[b parts, h, ...]`, or where heads have parts of their own, `[b h parts, 1, ...]`."""

    part: Parts
    those: slice  # of the parts
    texts: int
    heads: int

    @property
    def rows(self) -> Tensor:
        return self.part.rows[:, :, self.those]

    @property
    def cols(self) -> Tensor:
        return self.part.cols[:, :, self.those]

    def gathered(self, call: Call, tensors: Tensors) -> tuple[Call, Tensor, Tensor, Tensor]:
        """The call of these parts, with its queries, keys and values."""
        q, k, v = tensors
        if _by_head(self.part):
            k, v = call.spread(k), call.spread(v)
        rows = self.rows.clamp(max=q.shape[2] - 1)  # of those that are nobody any will do
        at = self.numbers(self.cols, *k.shape[1:3])
        q, k, v = self._take(q, self.numbers(rows, *q.shape[1:3])), self._take(k, at), self._take(v, at)
        own = replace(
            call, queries=self._places(call.queries, rows), keys=self._places(call.keys, self.cols),
            heads=q.shape[1], kv_heads=k.shape[1], batch=len(q), keep=self._kept(), mask=Mask(),
            query=q, key=k, value=v, ids=None, hidden=None, rotate=None,
        )  # fmt: skip
        return own, q, k, v

    def numbers(self, where: Tensor, heads: int, many: int) -> Tensor:
        """Which rows of `[b heads many]` these tokens `[b|1 h|1 parts m]` are, as the parts have them, `[... m]`."""
        where = where.expand(self.texts, heads, *where.shape[2:])
        lines = torch.arange(self.texts * heads, device=where.device).view(self.texts, heads, 1, 1) * many
        return self._laid((where + lines).where(where < many, self.texts * heads * many))

    def _laid(self, x: Tensor) -> Tensor:
        """Something of the tokens of each part `[b h parts ...]`, as parts are texts."""
        return x.flatten(0, 2)[:, None] if _by_head(self.part) else x.transpose(1, 2).flatten(0, 1)

    def add(self, to: Tensor, x: Tensor, where: Tensor) -> None:
        """Give tokens `[b h|g n d]` what stands for them in the parts, heads of a group together."""
        group = self.heads // to.shape[1] if _by_head(self.part) else 1
        at = self.numbers(where.clamp(max=to.shape[2] - 1), to.shape[1] * group, to.shape[2])
        whole = to if group == 1 else to.new_zeros(len(to), self.heads, *to.shape[2:])
        whole.view(-1, to.shape[-1]).index_add_(0, at.flatten(), x.reshape(-1, to.shape[-1]))
        if group > 1:
            to += whole.unflatten(1, (-1, group)).sum(2)

    def _take(self, x: Tensor, at: Tensor) -> Tensor:
        """Of something of tokens `[b h n d]`, by their numbers."""
        return x.reshape(-1, x.shape[-1]).index_select(0, at.flatten()).view(*at.shape, x.shape[-1])

    def _places(self, whole: Positions, where: Tensor) -> Positions:
        heads = self.heads if _by_head(self.part) else 1
        if whole.first is not None and whole.pads == (0, 0):
            index = self._laid(where.expand(self.texts, heads, *where.shape[2:])) + whole.first
            return Positions(index, index, None, whole.pads)
        at = self.numbers(where, heads, len(whole))

        def take(x: Tensor) -> Tensor:
            return self._take(spread_heads(x, self.heads).expand(self.texts, heads, -1)[..., None], at)[..., 0]

        index = take(whole.index)
        return Positions(index, index if whole.position is whole.index else take(whole.position), None, whole.pads)

    def _kept(self) -> Tensor | None:
        if self.part.keep is None:
            return None
        keep = self.part.keep(self.those)
        heads = self.heads if _by_head(self.part) else keep.shape[1]
        return self._laid(keep.expand(self.texts, heads, *keep.shape[2:]))
