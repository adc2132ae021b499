"""Block sizes: what was measured on a card where there is something, else what is safe; and that is said."""

from __future__ import annotations

import pytest
import torch

from heedful.gpu import blocks
from heedful.gpu.blocks import BACK, ROWS, STEP, Tiles, tiles

NARROW = torch.empty(0, dtype=torch.bfloat16)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"sm_90": {ROWS: {"128": [128, 128, 8, 3]}}}
    monkeypatch.setattr(blocks, "table", lambda: table)
    monkeypatch.setattr(blocks, "architecture", lambda device: "sm_90")


@pytest.mark.parametrize("kind", [ROWS, BACK, STEP])
@pytest.mark.parametrize("width", [1, 16, 33, 64, 100, 128, 256])
def test_what_is_not_measured_is_safe(kind: str, width: int) -> None:
    fit = tiles(kind, width, 10_000, NARROW)
    assert not fit.tuned
    wide = 1 << max(4, (width - 1).bit_length())
    assert fit.keys * wide * (2 if kind == BACK else 1) <= 64 * 64 or fit.keys == 16
    assert fit.keys >= 16


def test_what_is_measured_is_taken(measured: None) -> None:
    assert tiles(ROWS, 128, 4096, NARROW) == Tiles(128, 128, 8, 3, tuned=True)
    assert tiles(ROWS, 100, 4096, NARROW) == Tiles(128, 128, 8, 3, tuned=True)
    assert not tiles(ROWS, 64, 4096, NARROW).tuned
    assert not tiles(BACK, 128, 4096, NARROW).tuned
    assert tiles(ROWS, 128, 4096, NARROW).how == {"num_warps": 8, "num_stages": 3}


def test_what_was_measured_of_16_bits_is_not_taken_for_32(measured: None) -> None:
    """They need twice the shared memory, and may not have it."""
    assert tiles(ROWS, 128, 4096, torch.empty(0)) == blocks.safe(128)


def test_a_tile_is_no_longer_than_the_call_and_lies_in_one_block(measured: None) -> None:
    assert tiles(ROWS, 128, 3, NARROW).rows == 16
    assert tiles(ROWS, 128, 40, NARROW).rows == 64
    assert tiles(ROWS, 128, 4096, NARROW, block=64).keys == blocks.safe(128).keys
    assert tiles(ROWS, 128, 4096, NARROW, block=256).keys == 128


@pytest.mark.parametrize(("keys", "programs"), [(32768, 8), (8192, 8), (32768, 1), (100, 1), (32768, 128), (0, 1)])
def test_long_caches_are_divided_until_there_are_programs_enough(keys: int, programs: int) -> None:
    span = blocks.span(keys, programs)
    if programs >= blocks.FEW or keys <= blocks.LEAST:
        assert span == max(1, keys)
        return
    assert span & (span - 1) == 0
    assert blocks.LEAST <= span <= blocks.SPAN
    assert -(-keys // span) * programs >= blocks.FEW or span == blocks.LEAST
    assert blocks.span(keys, programs, whole=True) == keys


def test_what_is_shipped_can_be_read() -> None:
    for kinds in blocks.table().values():
        for kind, widths in kinds.items():
            assert kind in (ROWS, BACK, STEP)
            assert all(Tiles(*sizes).keys >= 16 for sizes in widths.values())
