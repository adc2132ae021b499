"""Packed keys and values, number by number: what is held, taken and joined."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.conformance.tolerances import close
from heedful.kit.packing import Channels, Codes, _small

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
GROUP = torch.tensor([3, 3, 0, 3, 0, 7])


def behind(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second])


def rounded(values: Tensor, bits: int) -> Tensor:
    """Numbers that share a scale, in so many bits."""
    low, high = float(values.min()), float(values.max())
    step = (high - low) / (2**bits - 1)
    return torch.tensor([low + step * (round((float(x) - low) / step) if step else 0) for x in values])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_a_group_share_a_scale_in_each_channel(bits: int) -> None:
    want = torch.empty_like(X)
    for group in (0, 3, 7):
        for channel in range(5):
            want[group == GROUP, channel] = rounded(X[group == GROUP, channel], bits)
    packed = Codes.by_group(X, GROUP, bits)
    assert close(packed.tensor(), want)
    assert (len(packed), packed.codes.shape[1]) == (6, -(-5 * bits // 8))
    assert len(packed.low) == 3


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("span", [1, 2, 5, 8])
def test_neighbouring_channels_of_a_row_share_a_scale(bits: int, span: int) -> None:
    want = torch.empty_like(X)
    for row in range(6):
        for start in range(0, 5, span):
            want[row, start : start + span] = rounded(X[row, start : start + span], bits)
    packed = Codes.by_row(X, span, bits)
    assert close(packed.tensor(), want)
    assert packed.low.shape == (6, -(-5 // span))


@pytest.mark.parametrize("packed", [Codes.by_group(X, GROUP, 4), Codes.by_row(X, 2, 4)], ids=["group", "row"])
def test_codes_are_taken_and_joined_as_rows_are(packed: Codes) -> None:
    whole, which = packed.tensor(), torch.tensor([5, 0, 4])
    some = packed.take(which)
    assert torch.equal(some.tensor(), whole[which])
    both = some.join(packed, behind)
    assert torch.equal(both.tensor(), torch.cat([whole[which], whole]))
    assert len(both.codes) == len(both) == 9
    kept = packed.take(torch.tensor([True, False, False, True, False, False]))
    assert torch.equal(kept.tensor(), whole[[0, 3]])
    assert len(kept.low) == (1 if packed.slot is not None else 2), "scales that nobody needs are gone"
    assert packed.form == some.form == both.form


def test_groups_are_told_apart_however_many_come_together() -> None:
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    one = Codes.by_group(x, torch.arange(200), 8)
    both = one.join(Codes.by_group(-x, torch.arange(200), 8), behind)
    assert torch.equal(both.tensor(), torch.cat([x, -x]))
    assert (one.slot.dtype, both.slot.dtype) == (torch.uint8, torch.int16)


def test_a_step_that_rounds_down_takes_no_code_beyond_the_last() -> None:
    """The smallest numbers of half precision are whole multiples of one: 300 of them in 255 steps of one each."""
    least = 2.0**-24
    packed = Codes.by_row(torch.tensor([[0.0, 300 * least]]).half(), 2, 8)
    assert packed.tensor().tolist() == [[0.0, 255 * least]]
    assert Codes.by_row(torch.tensor([[0.0, least]]).half(), 2, 8).tensor().tolist() == [[0.0, 0.0]]  # no step at all


def test_half_precision_is_a_step_off_at_most() -> None:
    half = X.half()
    packed = Codes.by_row(half, 5, 8)
    assert packed.tensor().dtype == torch.float16
    assert torch.equal(packed.low[:, 0], half.amin(1))
    assert bool(((packed.tensor() - half).abs() <= packed.step).all())
    assert Codes.by_row(half, 5, 4).form != packed.form
    assert Codes.by_group(X, GROUP, 8).form != Codes.by_row(X, 1, 8).form


def channels_of(x: Tensor, held: list[list[int]], slot: list[int]) -> tuple[Channels, Tensor]:
    table = torch.zeros(len(held), x.shape[1], dtype=torch.bool)
    for i, row in enumerate(held):
        table[i, row] = True
    kept = table[slot]
    return Channels.of(x, table, torch.tensor(slot)), x * kept


def test_channels_that_are_not_held_are_zero() -> None:
    packed, want = channels_of(X, [[0, 3], [1, 4], [0, 3]], [0, 1, 1, 2, 0, 2])
    assert torch.equal(packed.tensor(), want)
    assert packed.form == (2, 5)
    assert (len(packed), len(packed.channel)) == (6, 2), "each set of channels is held once"
    some = packed.take(torch.tensor([4, 0]))
    assert torch.equal(some.tensor(), want[[4, 0]])
    assert len(some.channel) == 1


def test_channels_are_joined_with_others() -> None:
    one, first = channels_of(X, [[0, 3], [1, 2]], [0, 1, 0, 1, 1, 0])
    other, second = channels_of(2 * X[:3], [[2, 4], [0, 1], [0, 3]], [2, 0, 1])
    both = one.join(other, behind)
    assert torch.equal(both.tensor(), torch.cat([first, second]))
    assert len(both.channel) == 4
    assert torch.equal(other.join(one, behind).tensor(), torch.cat([second, first]))


@pytest.mark.parametrize(
    ("count", "dtype"),
    [
        (1, torch.uint8), (2**8, torch.uint8), (2**8 + 1, torch.int16), (2**15, torch.int16),
        (2**15 + 1, torch.int32), (2**16, torch.int32), (2**20, torch.int32),
    ],
)  # fmt: skip
def test_small_numbers_take_few_bytes(count: int, dtype: torch.dtype) -> None:
    found = _small(torch.tensor([0, count - 1]), count)
    assert found.dtype == dtype
    assert found.tolist() == [0, count - 1]
