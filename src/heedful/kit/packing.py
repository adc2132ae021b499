"""Forms in which keys and values take less memory: numbers of few bits, and some of the channels."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heedful.core.packed import Packed, Weave
from heedful.kit.running import wide


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
        low, high = _by(span, x).aminmax(dim=-1)
        return Codes._of(x, low, high, None, bits, span)

    @staticmethod
    def _of(x: Tensor, low: Tensor, high: Tensor, slot: Tensor | None, bits: int, span: int) -> Codes:
        step = ((high - wide(low)[0]) / (2**bits - 1)).to(low.dtype)
        code = ((_by(span, x) - _each(low, slot)) / _each(step, slot)).nan_to_num(0.0)  # equal numbers' is 0 / 0
        code = code.round().clamp(0, 2**bits - 1).to(torch.uint8).flatten(1)[:, : x.shape[1]]
        codes = (_by(8 // bits, code) << _places(bits, x.device)).sum(-1, dtype=torch.uint8)
        return Codes(codes, low, step, slot, bits, span, x.shape[1])

    @property
    def form(self) -> Hashable:
        return self.bits, self.span, self.width, self.slot is None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.width

    def tensor(self) -> Tensor:
        codes = (self.codes[..., None] >> _places(self.bits, self.codes.device)) & (2**self.bits - 1)
        codes = _by(self.span, codes.flatten(1)[:, : self.width])
        out = _each(self.low, self.slot) + _each(self.step, self.slot) * codes
        return out.flatten(1)[:, : self.width].to(self.low.dtype)

    def take(self, which: Tensor) -> Codes:
        if self.slot is None:
            return replace(self, codes=self.codes[which], low=self.low[which], step=self.step[which])
        used, slot = self.slot[which].unique(return_inverse=True)
        low, step = self.low[used.long()], self.step[used.long()]
        return replace(self, codes=self.codes[which], low=low, step=step, slot=_small(slot, len(used)))

    def join(self, more: Codes, weave: Weave) -> Codes:
        codes = weave(self.codes, more.codes)
        if self.slot is None or more.slot is None:
            return replace(self, codes=codes, low=weave(self.low, more.low), step=weave(self.step, more.step))
        low, step = torch.cat([self.low, more.low]), torch.cat([self.step, more.step])
        slot = weave(self.slot.long(), more.slot.long() + len(self.low))
        return replace(self, codes=codes, low=low, step=step, slot=_small(slot, len(low)))


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

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.width

    def tensor(self) -> Tensor:
        out = self.rows.new_zeros(len(self.rows), self.width)
        return out.scatter(1, self.channel.long()[self.slot.long()], self.rows)

    def take(self, which: Tensor) -> Channels:
        return replace(self, rows=self.rows[which], slot=self.slot[which])._shared()

    def join(self, more: Channels, weave: Weave) -> Channels:
        rows = weave(self.rows, more.rows)
        if torch.equal(self.channel, more.channel):
            return replace(self, rows=rows, slot=weave(self.slot, more.slot))
        slot = weave(self.slot.long(), more.slot.long() + len(self.channel))
        return Channels(rows, torch.cat([self.channel, more.channel]), slot, self.width)._shared()


def _each(x: Tensor, slot: Tensor | None) -> Tensor:
    """What `[s c]` says of each row, `[t c 1]`, wide enough to compute with."""
    (x,) = wide(x if slot is None else x[slot.long()])
    return x[..., None]


def _places(bits: int, device: torch.device) -> Tensor:
    """Where in a byte its codes begin."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def _by(span: int, x: Tensor) -> Tensor:
    """Rows `[t d]` as `[t c span]`, where the last channel fills up."""
    if short := -x.shape[1] % span:
        x = torch.cat([x, x[:, -1:].expand(-1, short)], 1)
    return x.unflatten(1, (-1, span))


def _small(slot: Tensor, count: int) -> Tensor:
    """Numbers below `count` in as few bytes as hold them."""
    return slot.to(torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32)
