"""Entries by rank, of which ranges are asked: how many are low, what they add up to, and which is the n-th."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Ranked(NamedTuple):
    """A permutation `[... n]` and a number for each of its entries, parted by one binary digit of rank after another.

    That is a wavelet matrix: a range of entries stays two ranges, of those with a 0 and of those with a 1, so an answer
    costs a step for each digit, however long the range is.
    """

    digits: tuple[tuple[int, Tensor, Tensor], ...]  # from the highest: how many zeros there are before each entry, and
    # what their numbers add up to, `[... n + 1]`

    @staticmethod
    def of(rank: Tensor, x: Tensor) -> Ranked:
        """Sums are made in double precision, since answers are differences of them."""
        found, x = [], x.double()
        for digit in reversed(range(rank.shape[-1].bit_length())):  # so many that the limit above all ranks has
            ones = rank >> digit & 1
            found.append((digit, pad((1 - ones).cumsum(-1), (1, 0)), pad((x * (1 - ones)).cumsum(-1), (1, 0))))
            order = ones.argsort(dim=-1, stable=True)
            rank, x = rank.gather(-1, order), x.gather(-1, order)
        return Ranked(tuple(found))

    def below(self, start: Tensor, stop: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """How many of each range `[... q]` rank below a limit, and what their numbers add up to."""
        ends, count = torch.cat([start, stop], -1), torch.zeros_like(start)
        total = torch.zeros(start.shape, dtype=torch.double, device=start.device)
        for digit, zeros, sums in self.digits:
            none, high = zeros.gather(-1, ends), (limit >> digit & 1).bool()
            count = count + _between(none).where(high, 0)
            total = total + _between(sums.gather(-1, ends)).where(high, 0.0)
            ends = _parted(zeros, ends, none, high)
        return count, total

    def nth(self, start: Tensor, stop: Tensor, n: Tensor) -> Tensor:
        """The rank of the entry of each range that has `n` below it; some number where there is none."""
        ends, found = torch.cat([start, stop], -1), torch.zeros_like(start)
        for digit, zeros, _ in self.digits:
            none = zeros.gather(-1, ends)
            high = n >= _between(none)
            found = found + (high.long() << digit)
            n = n - _between(none).where(high, 0)
            ends = _parted(zeros, ends, none, high)
        return found


def _between(x: Tensor) -> Tensor:
    """What is told before the end of each range, less what is before its start."""
    before, behind = x.chunk(2, -1)
    return behind - before


def _parted(zeros: Tensor, ends: Tensor, none: Tensor, high: Tensor) -> Tensor:
    """Where those of each range that have a 1, behind all zeros, start and stop, or those that have a 0 among these."""
    return (zeros[..., -1:] + ends - none).where(torch.cat([high, high], -1), none)
