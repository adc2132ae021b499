"""Forms in which keys and values take less memory: numbers of few bits, and some of the channels."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.core.packed import Packed


@dataclass(frozen=True, eq=False)
class Codes(Packed):
    """lo + step * code: codes of few bits, and lowest numbers and steps that rows or neighbouring channels share."""

    codes: Tensor  # [t, bytes], uint8
    low: Tensor  # [s c]
    step: Tensor  # [s c]
    slot: Tensor | None  # [t], the row of `low` and `step` that a row goes by; None: its own
    bits: int  # of a code: 2, 4 or 8
    span: int  # neighbouring channels that share
    width: int  # d

    @staticmethod
    def by_group(x: Tensor, group: Tensor, bits: int) -> Codes:
        """Rows `x [t d]`, of which those of one `group [t ...]` share a scale in each channel."""
        group, slot = group.unique(dim=0, return_inverse=True)
        shape, where = (len(group), x.shape[1]), slot[:, None].expand(x.shape)
        low = x.new_full(shape, torch.inf).scatter_reduce(0, where, x, "amin")
        high = x.new_full(shape, -torch.inf).scatter_reduce(0, where, x, "amax")
        return Codes._of(x, low, high, _small(slot, len(group)), bits, 1)

    @staticmethod
    def by_row(x: Tensor, span: int, bits: int) -> Codes:
        """Rows `x [t d]`, each with a scale for every `span` channels."""
        channels = torch.arange(-(-x.shape[1] // span) * span, device=x.device)
        parts = x[:, channels.clamp(max=x.shape[1] - 1)].unflatten(1, (-1, span))  # the last channel fills up
        return Codes._of(x, parts.amin(-1), parts.amax(-1), None, bits, span)

    @staticmethod
    def _of(x: Tensor, low: Tensor, high: Tensor, slot: Tensor | None, bits: int, span: int) -> Codes:
        wide = low.float() if low.dtype in (torch.float16, torch.bfloat16) else low
        step = ((high - wide) / (2**bits - 1)).to(low.dtype)
        blank = Codes(x.new_empty(len(x), 0), low, step, slot, bits, span, x.shape[1])
        low, step = blank._spread(low), blank._spread(step)
        code = ((x - low) / step.masked_fill(step == 0, 1.0)).round().clamp(0, 2**bits - 1).to(torch.uint8)
        per = 8 // bits
        code = pad(code, (0, -x.shape[1] % per)).unflatten(1, (-1, per))
        shift = bits * torch.arange(per, dtype=torch.uint8, device=x.device)
        return replace(blank, codes=(code << shift).sum(-1).to(torch.uint8))

    def _spread(self, x: Tensor) -> Tensor:
        """What `[s c]` says of each number, `[t d]`."""
        x = x if self.slot is None else x[self.slot.long()]
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return x if self.span == 1 else x.repeat_interleave(self.span, 1)[:, : self.width]

    @property
    def form(self) -> Hashable:
        return self.bits, self.span, self.width, self.slot is None

    def __len__(self) -> int:
        return len(self.codes)

    def tensor(self) -> Tensor:
        per = 8 // self.bits
        shift = self.bits * torch.arange(per, dtype=torch.uint8, device=self.codes.device)
        codes = ((self.codes[..., None] >> shift) & (2**self.bits - 1)).flatten(1)[:, : self.width]
        return (self._spread(self.low) + self._spread(self.step) * codes).to(self.low.dtype)

    def take(self, which: Tensor) -> Codes:
        if self.slot is None:
            return replace(self, codes=self.codes[which], low=self.low[which], step=self.step[which])
        used, slot = self.slot[which].unique(return_inverse=True)
        low, step = self.low[used.long()], self.step[used.long()]
        return replace(self, codes=self.codes[which], low=low, step=step, slot=_small(slot, len(used)))

    def join(self, more: Codes) -> Codes:
        slot = None
        if self.slot is not None and more.slot is not None:
            ahead = len(self.low)
            slot = _small(torch.cat([self.slot.long(), more.slot.long() + ahead]), ahead + len(more.low))
        codes, low, step = (torch.cat([getattr(self, name), getattr(more, name)]) for name in ("codes", "low", "step"))
        return replace(self, codes=codes, low=low, step=step, slot=slot)


@dataclass(frozen=True, eq=False)
class Channels(Packed):
    """Some channels of each row; the others are zero. Rows of one head share which."""

    rows: Tensor  # [t w]
    channel: Tensor  # [s w], int16: the channels that are held
    slot: Tensor  # [t], the row of `channel` that a row goes by
    width: int  # d

    @staticmethod
    def of(x: Tensor, held: Tensor, slot: Tensor) -> Channels:
        """Rows `x [t d]`, of which `held [s d]`, as many in every s, says the channels of each `slot [t]`."""
        channel = held.nonzero()[:, 1].view(len(held), -1)
        rows = x.gather(1, channel[slot])
        return Channels(rows, channel.to(torch.int16), slot, x.shape[1])._shared()

    def _shared(self) -> Channels:
        """Each set of channels once."""
        used, slot = self.slot.unique(return_inverse=True)
        channel, same = self.channel[used.long()].unique(dim=0, return_inverse=True)
        return replace(self, channel=channel, slot=_small(same[slot], len(channel)))

    @property
    def form(self) -> Hashable:
        return self.rows.shape[1], self.width

    def __len__(self) -> int:
        return len(self.rows)

    def tensor(self) -> Tensor:
        out = self.rows.new_zeros(len(self.rows), self.width)
        return out.scatter(1, self.channel.long()[self.slot.long()], self.rows)

    def take(self, which: Tensor) -> Channels:
        return replace(self, rows=self.rows[which], slot=self.slot[which])._shared()

    def join(self, more: Channels) -> Channels:
        slot = torch.cat([self.slot.long(), more.slot.long() + len(self.channel)])
        rows, channel = torch.cat([self.rows, more.rows]), torch.cat([self.channel, more.channel])
        return Channels(rows, channel, slot, self.width)._shared()


def _small(slot: Tensor, count: int) -> Tensor:
    """Numbers below `count` in as few bytes as hold them."""
    return slot.to(torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32)
