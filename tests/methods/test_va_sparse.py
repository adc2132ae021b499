"""VASparse against its score in loops: squares of what the newest query gives, and how much entries saw of an image."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close
from heedful.core.call import CachedKV, Call
from heedful.core.errors import FieldError
from heedful.core.positions import Positions
from heedful.methods.sparse.cache import va_sparse
from heedful.methods.sparse.cache.va_sparse import VASparse
from heedful.tiny import tiny

ROLES = {"image": ((1, 4), (6, 7)), "other": ((8, 10),)}
IMAGE = {"image": (1, 2, 3, 6), "other": (8, 9)}


def score(maps: Tensor, image: tuple[int, ...], saliency: float) -> list[float]:
    """Of every entry, by a layer's maps `[h n n]` of one text."""
    heads, n, _ = maps.shape
    looks = [sum(float(maps[h, i, k]) for h in range(heads) for k in image if k < n) / heads for i in range(n)]
    total = sum(math.exp(look) for look in looks)
    given = [sum(float(maps[h, n - 1, i]) for h in range(heads)) / heads for i in range(n)]
    return [g**2 + saliency * math.exp(look) / total for g, look in zip(given, looks, strict=True)]


def best(found: list[float], most: int) -> list[int]:
    return sorted(sorted(range(len(found)), key=lambda i: -found[i])[:most])


def texts(n: int = 12) -> Tensor:
    return torch.randint(3, 127, (2, n), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("rows", [256, 12, 5])
@pytest.mark.parametrize(("saliency", "role"), [(1.0, "image"), (0.2, "image"), (0.0, "image"), (1.0, "other")])
def test_the_best_by_squares_and_saliency_stay(
    saliency: float, role: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(va_sparse, "ROWS", rows)
    model, ids = tiny("llama", num_hidden_layers=1, attn_implementation="eager"), texts()
    maps = model(input_ids=ids, output_attentions=True).attentions[0]
    for most in (2, 5, 9):
        with attach(model, VASparse(most, saliency, role), roles=ROLES) as run:
            cache = run(input_ids=ids)[CACHE]
        for b in range(2):
            want = best(score(maps[b], IMAGE[role], saliency), most)
            assert [cache.layers[0].index[b, g].tolist() for g in range(2)] == [want, want]


@torch.no_grad()
def test_later_tokens_are_scored_with_what_earlier_ones_saw() -> None:
    """While nothing is dropped it is as if all had come at once; padding looks at nothing and is no entry."""
    model, ids = tiny("llama", num_hidden_layers=1), texts()
    pads = torch.tensor([0, 3])
    padded = torch.stack([torch.cat([torch.zeros(3, dtype=torch.long), ids[0]]), torch.cat([ids[1], ids[0, :3]])])
    mask = torch.stack([torch.cat([torch.zeros(3), torch.ones(12)]), torch.ones(15)]).long()
    for method in (VASparse(6), VASparse(6, 0.1)):
        with attach(model, method, roles=ROLES) as run:
            whole = run(input_ids=ids)[CACHE].layers[0].index
            left = run(input_ids=padded, attention_mask=mask)[CACHE].layers[0].index
            assert torch.equal(left[0] - int(pads[1]), whole[0])
        with attach(model, method, roles=ROLES) as run:
            cache: Any = None
            for start, stop in ((0, 4), (4, 6)):
                cache = run(input_ids=ids[:, start:stop], **{CACHE: cache})[CACHE]
            parts = run(input_ids=ids[:, 6:], **{CACHE: cache})[CACHE].layers[0].index
        assert torch.equal(parts, whole)


def test_what_a_text_saw_by_loops() -> None:
    """With two key heads, a soft cap, padding and entries of an earlier call."""
    draw = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 4, 5, 4, generator=draw), torch.randn(2, 2, 9, 4, generator=draw)
    places = Positions.row(0, 9, pad=torch.tensor([0, 2]))
    position = places.position.expand(2, 1, 9)
    text = Positions(places.index[..., 4:], position[..., 4:], is_filled=position[..., 4:] >= 0)
    call = Call(0, 1, "layer", 4, 2, text, places, 0.7, softcap=1.5, query=query, roles={"image": ((1, 3), (5, 6))})
    found = VASparse().looks(CachedKV(key, key, places, 5), call)
    assert found.shape == (2, 1, 9)
    assert not found[..., :4].any()
    for b in range(2):
        for i in range(5):
            seen = [j for j in range(9) if 0 <= int(position[b, 0, j]) <= int(position[b, 0, 4 + i])]
            want = 0.0
            for h in range(4):
                scores = {j: 1.5 * math.tanh(float(query[b, h, i] @ key[b, h // 2, j]) * 0.7 / 1.5) for j in seen}
                total = sum(math.exp(s) for s in scores.values())
                want += sum(math.exp(s) for j, s in scores.items() if int(position[b, 0, j]) in (1, 2, 5)) / total / 4
            assert close(found[b, 0, 4 + i], torch.tensor(want))


def test_what_it_is_by_default() -> None:
    assert VASparse() == VASparse(0.5, 1.0, "image")
    assert VASparse().declares(80) == {"kept": 40}
    assert va_sparse.ROWS == 256


@pytest.mark.parametrize("fields", [{"saliency": -0.1}, {"saliency": math.inf}, {"role": ""}, {"budget": 0}])
def test_fields_that_say_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match=next(iter(fields))):
        VASparse(**fields)
