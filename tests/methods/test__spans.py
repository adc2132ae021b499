"""Spans that stay while there is room."""

from __future__ import annotations

import torch

from heedful.methods.sparse.tokens._spans import with_room


def test_of_equal_spans_the_first_stay() -> None:
    spans = tuple((3 * i, 3 * i + 2) for i in range(40))
    scores = torch.zeros(40)
    assert with_room(spans, scores, 11) == list(spans[:5])
    assert with_room(spans, scores, 10) == list(spans[:5])
    scores[30] = 1
    assert with_room(spans, scores, 5) == [spans[30], spans[0]]
    assert with_room(spans, scores, 1) == [spans[30]]
