"""What queries see of a tile, counted pair by pair."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.kit.seen import how_many, only_seen, softmax_over

TILE = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KEEP = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.5


def test_keys_are_counted_and_a_query_of_none_has_one() -> None:
    keep = KEEP.clone()
    keep[1, :, 2] = False
    counted = how_many(replace(Bare().call, keep=keep), TILE)
    assert counted.dtype == TILE.dtype
    assert counted.tolist() == [[[[max(1, sum(row))] for row in head] for head in text] for text in keep.tolist()]
    assert how_many(replace(Bare().call, keep=None), TILE).tolist() == [[[[5]]]]


def test_what_is_not_seen_is_zero() -> None:
    call = replace(Bare().call, keep=KEEP)
    given = TILE.clone()
    assert only_seen(given, call).tolist() == (TILE * KEEP).tolist()
    assert torch.equal(given, TILE)
    assert only_seen(given, replace(call, keep=None)) is given
    assert only_seen(given, call, into=True) is given
    assert torch.equal(given, TILE * KEEP)


def test_weights_are_of_what_is_kept() -> None:
    keep = KEEP.clone()
    keep[1, :, 2] = False
    found = softmax_over(TILE, keep)
    for text, head, row in torch.cartesian_prod(*map(torch.arange, TILE.shape[:3])).tolist():
        kept = keep[text, 0, row]
        raised = [math.exp(x) if stays else 0.0 for x, stays in zip(TILE[text, head, row].tolist(), kept, strict=True)]
        assert close(found[text, head, row], torch.tensor(raised, dtype=TILE.dtype) / max(sum(raised), 1e-9))
    assert torch.equal(softmax_over(TILE, None), TILE.softmax(-1))
