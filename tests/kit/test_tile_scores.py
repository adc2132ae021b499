"""Scores of a tile by a small net, and what a model adds to them, pair by pair."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.errors import SiteError
from heedful.kit.tile_scores import additive, biased, operands
from heedful.methods import NeuralAttention

ROWS, COLS = slice(5, 9), slice(2, 11)


def test_a_small_net_for_every_pair() -> None:
    draw = torch.Generator().manual_seed(1)
    q, k, of_query, of_key, out = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((2, 3, 4, 5), (2, 3, 6, 5), (7, 5), (7, 5), (1, 7))
    )
    found = additive(q, k, of_query, of_key, out)
    assert found.shape == (2, 3, 4, 6)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 2, 4), (1, 0, 1, 3)]:
        of_units = zip(out[0].tolist(), of_query @ q[b, h, i] + of_key @ k[b, h, j], strict=True)
        assert close(found[b, h, i, j], torch.tensor(sum(v * math.tanh(x) for v, x in of_units), dtype=torch.float64))


def test_weights_decide_in_which_precision() -> None:
    x, weight = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16), torch.ones(3, 4)
    assert additive(x, x, weight, weight, torch.ones(1, 3)).dtype == torch.float32


def test_operands_are_the_tile_s() -> None:
    bare = Bare()
    call = replace(bare.call, query=bare.q, key=bare.k).tile(ROWS, COLS)
    query, key = operands(NeuralAttention(), call)
    assert torch.equal(query, bare.q[:, :, 5:9])
    assert torch.equal(key, bare.k[:, :, 2:11])
    for missing in ("query", "key"):
        with pytest.raises(
            SiteError, match=r"NeuralAttention\(width=2\), layer 0: scores are those of a tile, from SCORES on"
        ):
            operands(NeuralAttention(), replace(call, **{missing: None}))


@pytest.mark.parametrize("rows", [1, 19])
def test_a_bias_is_added_where_it_belongs(rows: int) -> None:
    draw = torch.Generator().manual_seed(2)
    bias, scores = torch.randn(2, 4, rows, 19, generator=draw), torch.randn(2, 4, 4, 9, generator=draw)
    call = Bare().call.tile(ROWS, COLS)
    assert biased(scores, call) is scores
    found = biased(scores.double(), replace(call, bias=bias))
    assert found.dtype == torch.float64
    for b, h, i, j in [(0, 0, 0, 0), (1, 3, 3, 8), (0, 2, 1, 7), (1, 1, 2, 3)]:
        added = scores[b, h, i, j].double() + bias[b, h, i + 5 if rows > 1 else 0, j + 2]
        assert close(found[b, h, i, j], added)
