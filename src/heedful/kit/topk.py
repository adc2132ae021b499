"""The k best entries of every text, of which padding is never one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

TOGETHER = 64  # entries that are counted at once


def top_k(scores: Tensor, k: int | Tensor, is_text: Tensor | None) -> Tensor:
    """True at the k best of the real entries of each row of `scores [... n]`; the earlier of equals goes first.

    `k` is a count or several, `[... 1]`; for a share see `kit.budget.rooms`. `is_text` is boolean and broadcasts to
    `scores`; None: all are real. A text shorter than k is kept whole.
    """
    if is_text is None and isinstance(k, int) and 0 < k < scores.shape[-1]:
        return _above(scores, k)
    best = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = (torch.arange(scores.shape[-1], device=scores.device) < k).expand_as(best)
    if is_text is None:
        return torch.empty_like(chosen).scatter_(-1, best, chosen)
    text = is_text.expand_as(scores)
    # A second stable sort, and no fill with -inf: a real entry may score -inf itself and still comes before padding.
    padding_last = (~text).gather(-1, best).byte().argsort(dim=-1, stable=True)
    return torch.zeros_like(text).scatter_(-1, best.gather(-1, padding_last), chosen) & text


def _above(scores: Tensor, k: int) -> Tensor:
    """The k best of each row, found without sorting it: what is above the k-th, and the earliest of its equals."""
    least = scores.topk(k).values[..., -1:]
    if bool((lost := least.isnan()).any()):  # a number is below it, and it is its own equal
        scores, least = scores.isnan().to(scores.dtype).where(lost, scores), least.nan_to_num(1.0)
    chosen = ~(scores < least)
    if bool((chosen.sum(-1) == k).all()):
        return chosen
    equal = scores == least
    left = k - (chosen & ~equal).sum(-1, keepdim=True)
    return chosen & (~equal | (equal.cumsum(-1) <= left))


def places_of(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row `[... n]` is True, `[... m]`, and which of these there are: behind a row's last stands a 0."""
    flat = chosen.reshape(-1, chosen.shape[-1])
    row, column = flat.nonzero(as_tuple=True)
    count = row.bincount(minlength=len(flat))
    most = torch.arange(int(count.max()), device=chosen.device)
    places = column.new_zeros(len(flat), len(most))
    places[row, torch.arange(len(row), device=chosen.device) - (count.cumsum(0) - count)[row]] = column
    return places.view(*chosen.shape[:-1], -1), (most < count[:, None]).view(*chosen.shape[:-1], -1)


def place_of(seen: Tensor, count: int) -> Tensor:
    """Where the `count`-th True of each row `[... n]` stands, `[... 1]`; n where there are fewer.

    Sums of parts are added up, which is several times faster than every entry.
    """
    n = seen.shape[-1]
    parts = pad(seen, (0, -n % TOGETHER)).view(torch.uint8).unflatten(-1, (-1, TOGETHER))  # [... m 64]
    so_far = pad(parts.sum(-1, dtype=torch.int32).cumsum(-1), (1, 0))  # before each part, and after the last
    whole = (so_far[..., 1:] < count).sum(-1, keepdim=True)  # parts that end before it
    at = whole.clamp(max=parts.shape[-2] - 1)
    inside = parts.gather(-2, at[..., None].expand(*at.shape, TOGETHER))[..., 0, :].cumsum(-1)
    place = at * TOGETHER + (inside + so_far.gather(-1, at) < count).sum(-1, keepdim=True)
    return place.where(whole == at, n)


def smallest(rank: Tensor, k: int, start: Tensor, stop: Tensor) -> Tensor:
    """The k-th smallest of each range of a permutation `rank [... n]`, from `start [... q]` up to `stop`, `[... q]`.

    A range of fewer has n. Numbers are parted by one binary digit after another, the highest first, and with each it is
    counted how many of a range have a 0 there (a wavelet matrix), so that no range is sorted.
    """
    n, short = rank.shape[-1], stop - start < k
    left, found = torch.full_like(start, k - 1), torch.zeros_like(start)
    for digit in reversed(range((n - 1).bit_length())):
        ones = rank >> digit & 1
        zeros = pad((1 - ones).cumsum(-1), (1, 0))  # before each number, and in all
        before, behind = zeros.gather(-1, start), zeros.gather(-1, stop)
        high = left >= behind - before
        found = found + (high.long() << digit)
        left = left - (behind - before).where(high, 0)
        middle = zeros[..., -1:]
        start, stop = ((middle + x - z).where(high, z) for x, z in ((start, before), (stop, behind)))
        rank = rank.gather(-1, ones.argsort(dim=-1, stable=True))
    return found.where(~short, n)
