"""Spans of maps against sums over every pair, chosen one by one, and what is refused."""

from __future__ import annotations

import pytest
import torch

from heedful import models
from heedful.core.errors import FieldError
from heedful.explaining import Spans, spans
from heedful.explaining.spanning import cut

IDS = torch.randint(3, 127, (1, 17), generator=torch.Generator().manual_seed(0))


def by_hand(weights: list[list[float]], longest: int, price: float | None):
    n = len(weights)
    pairs = [(i, j) for i in range(n) for j in range(i + 1) if i - j < longest]
    pay = sum(weights[i][j] for i, j in pairs) / len(pairs) if price is None else price
    worth = {
        (a, b): sum(weights[i][j] - pay for i, j in pairs if a <= j and i < b)
        for a in range(n)
        for b in range(a + 2, n + 1)
        if b - a <= longest
    }
    found: dict[tuple[int, int], float] = {}
    while worth and max(worth.values()) > 0:
        a, b = max(worth, key=lambda span: worth[span])
        found[a, b] = worth[a, b]
        worth = {(c, d): x for (c, d), x in worth.items() if d <= a or c >= b}
    held = {i for a, b in found for i in range(a, b)}
    i = 0
    while i < n:
        if i in held:
            i += 1
            continue
        j = i
        while j < n and j not in held:
            j += 1
        found[i, j] = 0.0
        i = j
    return sorted(found.items())


@pytest.mark.parametrize(("longest", "price"), [(64, None), (4, None), (2, None), (5, 0.2), (6, 0.9), (9, 5.0)])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_triangles_are_taken_one_by_one(seed: int, longest: int, price: float | None) -> None:
    weights = (3 * torch.randn(13, 13, generator=torch.Generator().manual_seed(seed))).softmax(-1).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    places, scores = cut(weights, longest, price)
    wanted = by_hand(weights.tolist(), longest, price)
    assert list(places) == [span for span, _ in wanted]
    assert list(scores) == pytest.approx([score for _, score in wanted])


def test_blocks_are_found_as_they_are() -> None:
    weights = torch.zeros(12, 12)
    for start, stop in ((0, 4), (4, 9), (9, 12)):
        weights[start:stop, start:stop] = 1.0
    assert cut(weights.tril(), 8)[0] == ((0, 4), (4, 9), (9, 12))
    assert cut(torch.full((5, 5), 0.2), 8, 0.3) == (((0, 5),), (0.0,))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_text_is_cut_by_the_map_of_a_layer(kind: str) -> None:
    model = models.tiny(kind, attn_implementation="eager")
    with torch.no_grad():
        maps = model(input_ids=IDS, output_attentions=True).attentions
    found = spans(model, IDS, layer=1, longest=5)
    wanted = by_hand(maps[1][0].sum(0).tolist(), 5, None)
    assert list(found.places) == [span for span, _ in wanted]
    assert list(found.scores) == pytest.approx([score for _, score in wanted], rel=1e-3)
    assert found.places != spans(model, IDS, layer=0, longest=5).places
    assert len(found) == len(wanted)


def test_what_is_told() -> None:
    found = Spans(["The", " cat", " sat"], ((0, 2), (2, 3)), (1.25, 0.0))
    assert found.texts == ["The cat", " sat"]
    assert str(found) == "   0-1       1.25  'The cat'\n   2-2       0.00  ' sat'"
    assert "The cat" in found._repr_html_()
    model = models.tiny("llama")
    assert "".join(spans(model, IDS).texts).split() == [str(i) for i in IDS[0].tolist()]


def test_says_what_is_wrong() -> None:
    model = models.tiny("llama")
    with pytest.raises(FieldError, match="2 tokens or more"):
        spans(model, IDS, longest=1)
    found = spans(model, IDS, longest=2)
    assert {b - a for (a, b), score in zip(found.places, found.scores, strict=True) if score > 0} == {2}
    with pytest.raises(FieldError, match=r"must be one of \[0, 1\]"):
        spans(model, IDS, layer=2)
