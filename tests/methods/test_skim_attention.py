"""SkimAttention: the map in loops over places, that it is made once, and how it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, HeedfulError, SiteError
from heedful.core.regions import PerText, Region
from heedful.methods import SkimAttention

N, PAGE = 19, Region(((2, 12), (13, 18)), (3, 5))
OTHER = Region(((1, 19),), (9, 2))
PADDED = torch.arange(N)[None] >= torch.tensor([[0], [4]])


def params(width: int = 24, size: int = 10) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {
        "row": (size + 1, width), "column": (size + 1, width), "query": (4, 8, width), "key": (4, 8, width),
        "gain": (width,), "bias": (width,),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


def layout(page: Region, j: int, p: dict[str, Tensor]) -> Tensor:
    places = [i for start, stop in page for i in range(start, stop)]
    assert page.grid is not None
    y, x = (-1, -1) if j not in places else divmod(places.index(j), page.grid[1])
    both = p["row"][y + 1] + p["column"][x + 1]
    n = len(both)
    mean = sum(both) / n
    deviation = torch.sqrt(sum((a - mean) ** 2 for a in both) / n + 1e-5)
    return (both - mean) / deviation * p["gain"] + p["bias"]


def by_hand(p: dict[str, Tensor], v: Tensor, page: Region, seen: Any) -> Tensor:
    """Heads `[h n dv]` of one text with values `[g n dv]`."""
    n = v.shape[1]
    places = [layout(page, j, p) for j in range(n)]
    out = torch.zeros(4, n, v.shape[2], dtype=torch.float64)
    for h in range(4):
        for i in range(n):
            js = [j for j in range(n) if seen(i, j)]
            q = p["query"][h] @ places[i]
            scores = torch.stack([q @ (p["key"][h] @ places[j]) / math.sqrt(8) for j in js])
            out[h, i] = scores.softmax(0) @ v[h // (4 // len(v)), js]
    return out


def test_the_map_and_its_gradient() -> None:
    bare, given = Bare(Shape(dv=6), dtype=torch.float64, rules=()), params()
    bare.call = replace(bare.call, roles={"page": PerText((PAGE, OTHER))})
    leaves = [*given.values(), bare.v]
    for x in leaves:
        x.requires_grad_(True)
    found = bare.run(SkimAttention(10, "page"), "reference", params=given)[0]
    wanted = torch.stack([by_hand(given, bare.v[b], page, lambda i, j: True) for b, page in enumerate((PAGE, OTHER))])
    assert close(found, wanted)
    losses = [(x - 1).square().mean() for x in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_where_a_mask_hides_keys_and_behind_padding() -> None:
    bare = Bare(dtype=torch.float64)
    bare.call = replace(bare.call, roles={"patches": PAGE})
    found = bare.run(SkimAttention(10), "reference", params=params())[0]
    for b in range(2):
        assert close(found[b], by_hand(params(), bare.v[b], PAGE, lambda i, j: j <= i))
    padded = Bare(dtype=torch.float64, text=PADDED)
    padded.call = replace(padded.call, roles={"patches": PAGE})
    found = padded.run(SkimAttention(10), "reference", params=params())[0]
    short = Region(((2, 12), (13, 18)), (3, 5))
    assert not bool(found[1, :, :4].any())
    assert close(found[1, :, 4:], by_hand(params(), padded.v[1, :, 4:], short, lambda i, j: j <= i))


def test_the_map_is_made_once_of_places_alone() -> None:
    model = models.tiny("vit", image_size=16, num_hidden_layers=3)
    inputs = models.tiny_inputs(model)
    made: list[int] = []

    class Counted(SkimAttention):
        def _map(self, call: Any) -> Tensor:
            made.append(call.layer)
            return super()._map(call)

    with torch.no_grad(), attach(model, Counted(4)) as run:
        first = run(**inputs).logits
        for layer in model.vit.encoder.layer if hasattr(model.vit, "encoder") else model.vit.layers:
            for name, weight in layer.named_parameters():
                if any(part in name for part in ("query.", "key.", "q_proj", "k_proj")):
                    weight.mul_(3.0)
        assert close_model(run(**inputs).logits, first)
    assert made == [0, 0]
    with attach(model, SkimAttention(4)) as run:
        run(**inputs).logits.square().sum().backward()
        assert len(run.parameters()) == 6
        assert all(p.grad is not None and bool(p.grad.any()) for p in run.parameters())


def test_how_it_begins() -> None:
    layer = Layer(0, 4, 2, 8, 6, 32)
    found = SkimAttention(5).parameters(layer)
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    assert shapes == {
        "row": (6, 32), "column": (6, 32), "query": (4, 8, 32), "key": (4, 8, 32), "gain": (32,), "bias": (32,)
    }  # fmt: skip
    assert SkimAttention(5).parameters(replace(layer, number=1)) == {}
    assert torch.equal(found["gain"], torch.ones(32))
    assert not bool(found["bias"].any())
    assert 0.8 < float(found["row"].std()) < 1.2
    assert not torch.equal(found["row"], found["column"])
    assert not torch.equal(found["query"], found["key"])
    bound = 32**-0.5
    assert 0.9 * bound < float(found["query"].abs().max()) <= bound
    assert all(torch.equal(x, found[name]) for name, x in SkimAttention(5).parameters(layer).items())


def test_what_cannot_be() -> None:
    assert SkimAttention() == SkimAttention(64, "patches")
    assert SkimAttention(1).size == 1
    for wrong in ({"size": 0}, {"page": ""}):
        with pytest.raises(FieldError, match=rf"SkimAttention\.{next(iter(wrong))} = "):
            SkimAttention(**wrong)  # type: ignore[arg-type]
    model = models.tiny("vit", image_size=16)
    inputs = models.tiny_inputs(model)
    with pytest.raises(FieldError, match=r"SkimAttention\.size = 3: must be at least 4, as many rows or columns"):
        attach(model, SkimAttention(3))(**inputs)
    both, ids = models.tiny("bart"), torch.arange(3, 15)[None]
    for grid, rule in (
        ((3, 4), "one map serves the layers in which the page sees itself"),
        ((2, 2, 3), "must name tokens in rows and columns, and 'page' has 3 axes"),
        ((12,), "must name tokens in rows and columns, and 'page' has 1 axes"),
    ):
        roles = {"page": Region(((0, 12),), grid)}
        with pytest.raises(HeedfulError, match=rule), attach(both, SkimAttention(12, "page"), roles=roles) as run:
            run(input_ids=ids, decoder_input_ids=ids)
    bare = Bare()
    for odd in (replace(bare.call, cross=True), replace(bare.call, lowest=1)):
        with pytest.raises(SiteError, match="in which the page sees itself"):
            SkimAttention(10).attend((bare.q, bare.k, bare.v), odd)
    with pytest.raises(SiteError, match="layer 1: the map is made in layer 0, which is left out"):
        attach(models.tiny("vit", image_size=16), SkimAttention(4).on(layers=1))(**inputs)
