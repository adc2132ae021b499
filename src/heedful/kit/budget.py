"""How many cache entries a head may keep, and which: what every method that shortens the cache has in common."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Ge, Interval, doc
from torch import Tensor
from torch.nn.functional import pad

from heedful.core.call import CachedKV, Call
from heedful.core.state import ByIndex
from heedful.kit.topk import top_k

_RULE = doc("must be a share above 0 and at most 1, as 0.25, or a whole number of entries from 1 up, as 512")

# a whole number of entries a head, or a share of the text so far
Budget = Annotated[int, Ge(1), _RULE] | Annotated[float, Interval(gt=0, le=1), _RULE]


def is_whole(budget: Budget) -> bool:
    """Whether the budget is all of the text; the whole number 1 is a single entry."""
    return isinstance(budget, float) and budget == 1


def room_for(budget: Budget, tokens: int) -> int:
    """Entries that a head may hold after a text of so many tokens."""
    return budget if isinstance(budget, int) else max(1, math.ceil(budget * tokens))


def all_fit(room: int, tokens: int, acting: str) -> str | None:
    """Why a text is left whole that there is room for, and a setting that would act; None where there is none."""
    told = f"there is room for {room} tokens, and the text has {tokens}: {acting} would act"
    return told if room >= tokens else None


def rooms(budget: Budget, tokens: Tensor) -> Tensor:
    """`room_for` texts of so many tokens each; in Python's arithmetic, since float32 rounds shares otherwise."""
    return tokens.new_tensor([room_for(budget, n) for n in tokens.flatten().tolist()]).view_as(tokens)


def room(budget: Budget, call: Call) -> Tensor:
    """Entries that each head of each text may hold after this call, `[b|1 1 1]`."""
    if isinstance(budget, int):
        return call.q_pos.new_full((1, 1, 1), budget)
    if call.one_token and call.queries.first is not None:  # known without a look at a tensor
        return call.q_pos.new_full((1, 1, 1), room_for(budget, call.queries.first + 1))
    return rooms(budget, length(call))


def length(call: Call) -> Tensor:
    """How many tokens each text has so far, this call's included, `[b|1 1 1]`."""
    return _end(call) + 1


def earlier(call: Call) -> Tensor:
    """How many tokens each text had before this call, `[b|1 1 1]`."""
    return length(call) - call.is_text.sum(-1, keepdim=True)


def grown(call: Call) -> tuple[Tensor | int, Tensor | int]:
    """`earlier` and `length`, as plain numbers where they are known without a look at a tensor."""
    if call.one_token and call.queries.first is not None:
        return call.queries.first, call.queries.first + 1
    return earlier(call), length(call)


def between(entries: CachedKV, start: Tensor | int, stop: Tensor | int) -> Tensor:
    """Which entries `[b g k]` are tokens of the text at positions from `start` up to, not including, `stop`."""
    place = entries.positions.position
    there = ((place >= start) & (place < stop)).expand(entries.key.shape[:3])
    return there if entries.whole else there & entries.is_text


def _end(call: Call) -> Tensor:
    """The position of each text's last token so far, `[b|1 1 1]`; what is padded on the right ends before its row."""
    if call.one_token:
        return call.q_pos
    end = torch.where(call.is_text, call.q_pos, -1).amax((-2, -1), keepdim=True)
    padding = call.mask.padding
    if padding is None or bool((end >= 0).all()):
        return end
    # a chunk of a prompt may hold nothing but a row's padding: the text ended in an earlier one
    return padding.text[:, None, : int(call.queries.index.max()) + 1].sum(-1, keepdim=True) - 1


def newest(entries: CachedKV, call: Call, count: Tensor | int) -> Tensor:
    """Which entries `[b|1 g|1 k]` are among the last `count [b|1 1 1]` tokens of their text."""
    age = _end(call) - entries.positions.position
    return (age >= 0) & (age < count)


def added_up(name: str, given: Tensor, entries: CachedKV, call: Call, keep: Tensor | float = 1.0) -> Tensor:
    """What each entry was given `[b g k]`, on top of the share `keep [b|1 1 1]` of what earlier calls gave it.

    The sums are kept with the cache under that name, by index: nothing moves when entries go.
    """
    index = entries.positions.index.expand(given.shape)
    before = keep * call.state.cache.get(name, given[..., :0])
    total = pad(before, (0, entries.positions.end - before.shape[-1])).scatter_add(-1, index, given)
    call.state.cache[name] = ByIndex(total, -1)
    return total.gather(-1, index)


def keep_best(score: Tensor, entries: CachedKV, most: Tensor) -> Tensor:
    """Which entries `[b g k]` stay: each head's `most [b|1 g|1 1]` of the highest score `[b g k]`; padding goes first.

    Give infinity to what must stay, such as the newest entries. Where every head has room for all, nothing goes.
    """
    if score.shape[-1] <= int(most.min()):
        return entries.is_filled
    return top_k(score, most, None if entries.whole else entries.is_text)
