"""Maps in pieces: which rows and columns of a call are made at once, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heedful.conformance.bare import Bare, Shape
from heedful.core.mask import Blocks, Causal, First, Mask, Rule, Window
from heedful.kit import rows
from heedful.kit.rows import tiles

N = 19


@pytest.mark.parametrize(
    ("rules", "columns"),
    [
        ((), [slice(0, N)] * 5),
        ((Causal(),), [slice(0, 4), slice(0, 8), slice(0, 12), slice(0, 16), slice(0, N)]),
        ((Causal(), Window(3)), [slice(0, 4), slice(2, 8), slice(6, 12), slice(10, 16), slice(14, N)]),
        ((Causal(), Window(3) | First(1)), [slice(0, 4), slice(0, 8), slice(0, 12), slice(0, 16), slice(0, N)]),
        ((Blocks(torch.zeros(1, 1, 1, 1, dtype=torch.bool), N),), [slice(0, 1)] * 5),
    ],
    ids=repr,
)
def test_tiles_are_cut_to_what_their_rows_see(
    rules: tuple[Rule, ...], columns: list[slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LEAST", 2)
    monkeypatch.setattr(rows, "PIECE", 4 * 2 * 4 * N + 1)
    bare = Bare(Shape(q=N, k=N))
    call = replace(bare.call, mask=Mask(rules))
    found = list(tiles(call, 2))
    assert [part.cols for part in found] == columns
    assert [part.rows for part in found] == [slice(i, min(i + 4, N), 1) for i in range(0, N, 4)]
    whole = call.mask.keeps(call.pairs)
    for part in found:
        assert len(part.queries) == part.rows.stop - part.rows.start
        if whole is None:
            assert part.keep is None
        else:
            assert torch.equal(part.keep, whole[..., part.rows, part.cols])
