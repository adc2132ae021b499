"""softmax(m_j s_ij) over the k keys of highest m, which gates values too: m = clip(w x - tau_i, 0, 1), sum m = k."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.authoring import (
    CachedKV,
    Call,
    Causal,
    Layer,
    Mask,
    Method,
    Paper,
    PositiveInt,
    Site,
    SiteError,
    at,
)
from heedful.core.flags import at_least, whole
from heedful.core.mask import Padding
from heedful.core.positions import spread_heads
from heedful.kit.chosen import Chosen, Reached
from heedful.kit.feature_maps import drawn
from heedful.kit.running import wide
from heedful.kit.told import of_keys
from heedful.methods.mechanisms.routed._ranked import Ranked

ROWS = 128  # whose thresholds are sought at once by looking at each pair; those of more, where they can, by ranges


class SparseK(Method):
    """A token tells how much it counts as a key; queries see those that count most. For models trained with it.

    In the authors' models a sliding window stands beside it: `SparseK(64).on(heads=[2, 3])` beside heads that have one.
    """

    paper = Paper(
        "P229",
        "Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range Transformers",
        "Chao Lou, Zixia Jia, Zilong Zheng, Kewei Tu",
        2024,
        "2406.16747",
        differs=(
            "The authors' code was not to be had. Formulas are the paper's as others implement them, keys and values "
            "gated alike; what else it does to train stably is not part of it: a norm of scores, a slope over places, "
            "hard gates in the forward.",
            "A cache drops keys that are gated to nothing, which never come back; those few that are gated, and not "
            "among the k of highest gate, it holds too.",
            "Scores are gated as the model makes them, behind its scale and with any bias that it adds.",
            "What scores tokens is drawn as torch.nn.Linear draws it, by a generator seeded by the layer's number. "
            "Tokens that a cache took up without it are never chosen.",
        ),
    )
    subjects = ("text", "image")
    keep: PositiveInt = 512  # keys that a query sees, the k of the paper

    @classmethod
    def example(cls) -> SparseK:
        return cls(3)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        return {"score": drawn(random, layer.kv_heads, layer.width)}

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.MASK)
    def choose(self, mask: Mask, call: Call) -> Mask:
        if call.hidden is None:
            raise SiteError(f"SparseK, layer {call.layer}: the block is not handed hidden states to score by")
        (weight,) = wide(call.params["score"])
        told = of_keys(call, "scores", (call.hidden.flatten(1, -2).to(weight.dtype) @ weight.mT).mT[..., None])[..., 0]
        scores = spread_heads(told, call.heads).expand(-1, call.heads, -1)  # a mask may differ by head
        total = told.shape[-1]
        known = scores.isfinite()[:, :, None]
        rank = _rising(scores)[1].argsort(-1)
        looked_at = len(call.queries) <= ROWS or bool(mask.blocks) or not bool(known.all())
        ranges = None if looked_at else mask.key_ranges(call.queries, call.keys, call.heads)
        if ranges is not None and ranges.shape[3] == 1:  # a query's keys are one range, as in a plain text
            start, stop = (x.expand(*scores.shape[:2], -1) for x in ranges[..., 0, :].unbind(-1))
            levels, lowest = threshold_of_ranges(scores, rank, start, stop, self.keep)
            call.state.forward[str(call.layer)] = scores, levels[..., None]
            least, place = lowest.to(whole(total))[..., None], rank.to(whole(total))[:, :, None]
            return mask & Reached(
                lambda rows, cols: at_least(place[..., cols], least[:, :, rows]),
                lambda rows: (place >= least[:, :, rows].amin(2, keepdim=True)).flatten(0, 2).any(0),
            )
        places, place = call.places, rank[:, :, None]

        def seen(rows: slice) -> Tensor:
            part = places.tile(rows, slice(0, total))
            keep = mask.keeps(part.pairs)
            return known.expand(-1, -1, len(part.queries), -1) & (True if keep is None else keep)

        rows = [slice(i, i + ROWS) for i in range(0, len(call.queries), ROWS)]
        order = _Order.of(scores[:, :, None])
        found = [threshold(scores[:, :, None], seen(part), self.keep, order) for part in rows]
        levels, lowest = (torch.cat(x, 2) for x in zip(*found, strict=True))
        call.state.forward[str(call.layer)] = scores, levels
        return mask & Chosen(lambda rows: seen(rows) & (place >= lowest[:, :, rows]))

    @at(Site.CACHE)
    def drop(self, entries: CachedKV, call: Call) -> Tensor:
        """Thresholds only rise while nothing that was seen goes out of sight, as by keys that another method chose."""
        others = [rule for rule in call.mask.rules if not isinstance(rule, Causal | Padding)]
        if not (len(others) == 1 and isinstance(others[0], Chosen | Reached)):
            return entries.is_filled
        scores, levels = call.state.forward[str(call.layer)]
        last = call.last.expand(len(levels), 1)[..., None, None].expand(-1, call.heads, -1, -1)
        kept = scores > levels.expand(-1, call.heads, -1, -1).gather(2, last)[..., 0]
        return entries.is_text & kept[:, :: call.heads // call.kv_heads]  # heads that share keys agree

    @at(Site.SCORES)
    def gate(self, scores: Tensor, call: Call) -> Tensor:
        return scores * self._gates(call).to(scores.dtype)

    @at(Site.PATTERN)
    def gate_values(self, pattern: Tensor, call: Call) -> Tensor:
        return pattern * self._gates(call).to(pattern.dtype)

    def _gates(self, call: Call) -> Tensor:
        """How far each of the tile's keys is let through for each of its queries, `[b h r k]`."""
        scores, levels = call.state.forward[str(call.layer)]
        return (scores[:, :, None, call.cols] - levels[:, :, call.rows]).clamp(0, 1)


class _Order(NamedTuple):
    """What rows that share their entries share of where the sum of gates may bend."""

    rising: Tensor  # the entries, from the lowest
    order: Tensor  # which these are
    bends: Tensor  # numbers that a threshold may pass, from the lowest
    full: Tensor  # how many entries a threshold at each bend leaves below those that it lets through whole
    some: Tensor  # and how many it lets nothing through of

    @staticmethod
    def of(scores: Tensor) -> _Order:
        rising, order = _rising(scores)
        bends = torch.cat([rising, rising - 1], -1).sort(-1).values
        full, some = (torch.searchsorted(rising, x, right=True) for x in (bends + 1, bends))
        return _Order(rising, order, bends, full, some)

    def middle(self, below: Callable[[Tensor], tuple[Tensor, Tensor]], count: Tensor, k: int) -> Tensor:
        """A number between the two bends that a threshold lies between, in each row.

        `below` tells how many of a row's entries rank below a limit, and what they add up to; in all it has `count`.
        """

        def gates(bend: Tensor) -> Tensor:
            """What the gates of each row add up to at one of the bends."""
            (ends, upto), (starts, under) = (below(_at(x, bend)) for x in (self.full, self.some))
            return upto - under - _at(self.bends, bend) * (ends - starts) + count - ends

        last = torch.zeros_like(count)  # the last bend at which they are k or more
        for step in reversed(range(self.bends.shape[-1].bit_length())):
            next_ = (last + (1 << step)).clamp(max=self.bends.shape[-1] - 2)
            last = next_.where(gates(next_) >= k, last)
        return (_at(self.bends, last) + _at(self.bends, last + 1)) / 2


def threshold(scores: Tensor, there: Tensor, k: int, known: _Order | None = None) -> tuple[Tensor, Tensor]:
    """tau with sum clip(scores - tau, 0, 1) = k over the entries of each row that are there, `[... 1]`.

    Where there are no more than k, it is low enough to let all of them through. Its gradient is that of the paper's
    projection, since which entries lie between 0 and 1 does not change nearby. Beside it stands the place of the k-th
    highest, of all from the lowest. Rows share the order of their entries, which may be known already.
    """
    with torch.no_grad():
        known = known or _Order.of(scores)
        rising = known.rising
        held = there.gather(-1, known.order.expand_as(there))
        many = pad(held.cumsum(-1, dtype=torch.int32), (1, 0))
        below = pad((rising * held).cumsum(-1), (1, 0))
        count = many[..., -1:].long()
        first = (torch.searchsorted(many, torch.ones_like(count)) - 1).clamp(max=rising.shape[-1] - 1)
        least = _at(rising, first).where(count > 0, 0.0)
        lowest = torch.searchsorted(many, count - k, right=True) - 1

        middle = known.middle(lambda limit: (_at(many, limit), _at(below, limit)), count, k)
        inside = there & (scores > middle) & (scores < middle + 1)
        ends, starts = (_at(many, torch.searchsorted(rising, x.mT).mT) for x in (middle + 1, middle))
        over, partly = count - ends, ends - starts
    total = scores.where(inside, 0.0).sum(-1, keepdim=True)
    level = ((total + over - k) / partly.clamp(min=1)).where(partly > 0, middle)
    return level.where(count > k, least - 2), lowest


def threshold_of_ranges(scores: Tensor, rank: Tensor, start: Tensor, stop: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same for rows that each see one range of the entries `[... n]`, whose ranks from the lowest are known."""
    known, ranked, count = _Order.of(scores.detach()), Ranked.of(rank, scores), stop - start
    with torch.no_grad():
        middle = known.middle(lambda limit: ranked.below(start, stop, limit), count, k)
        ends, starts = (torch.searchsorted(known.rising, x) for x in (middle + 1, middle))
        first = ranked.nth(start, stop, torch.zeros_like(count)).clamp(max=scores.shape[-1] - 1)
        least = _at(known.rising, first).where(count > 0, 0.0)
        lowest = ranked.nth(start, stop, (count - k).clamp(min=0))
    (open_, upto), (shut, under) = (ranked.below(start, stop, limit) for limit in (ends, starts))
    partly, over = open_ - shut, count - open_
    level = ((upto - under + over - k) / partly.clamp(min=1)).where(partly > 0, middle).to(scores.dtype)
    return level.where(count > k, least - 2), lowest


def _rising(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores from the lowest, of equals the last first, and which they are; those that are not known are zeros."""
    scores = scores.detach().masked_fill(scores == -torch.inf, 0.0)
    order = scores.argsort(dim=-1, descending=True, stable=True).flip(-1)
    return scores.gather(-1, order), order


def _at(x: Tensor, where: Tensor) -> Tensor:
    """Entries of rows, or of one row for all."""
    return x.expand(*where.shape[:-1], -1).gather(-1, where)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, SparseK(4)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()}, run.activity())
