"""LearnedAggregation against the authors' layer for one token, number by number."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Causal, Layer, Mask
from heedful.core.errors import FieldError
from heedful.core.regions import Region
from heedful.methods import LearnedAggregation
from tests.images_by_hand import agree, image_call, image_of

E = 6


def _normed(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.sum() / len(x)
    return centred / ((centred**2).sum() / len(x) + 1e-6) ** 0.5 * p[f"{name}_norm"] + p[f"{name}_norm_bias"]


@pytest.mark.parametrize(("grid", "after", "inner"), [((2, 3), 0, 3.0), ((3, 2), 2, 0.5)])
def test_one_token_reads_the_patches(grid: tuple[int, int], after: int, inner: float) -> None:
    method = LearnedAggregation(inner, 1.0)
    call, x = image_call(method, grid, 1, after, E)

    def by_hand(tokens: Tensor, p: dict[str, Tensor]) -> Tensor:
        def through(name: str, y: Tensor) -> Tensor:
            return p[name] @ y + p[f"{name}_bias"]

        token = p["token"]
        seen = [_normed(y, p, "attend") for y in (token, *image_of(tokens, grid, 1).values())]
        query = through("query", seen[0])
        weights = torch.stack([query @ (p["key"] @ y) for y in seen]).div(E**0.5).softmax(0)
        pooled = sum(w * through("value", y) for w, y in zip(weights, seen, strict=True))
        token = token + p["attend_scale"] * through("out", pooled)
        up = through("up", _normed(token, p, "feed"))
        token = token + p["feed_scale"] * through("down", up * (1 + torch.erf(up / math.sqrt(2))) / 2)
        return torch.stack([token, *tokens[1:]])

    agree(method.pool, by_hand, call, x)


def test_a_model_is_read_at_its_last_layer() -> None:
    model = models.tiny("vit", image_size=16)
    with attach(model, LearnedAggregation.example().on(layers=1)) as run:
        run(**models.tiny_inputs(model)).logits.square().sum().backward()
        grads = [p.grad for name, p in model.named_parameters() if "heedful" in name]
        assert len(grads) == 18
        assert all(g is not None and bool(g.any()) for g in grads)


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=100)
    before = torch.get_rng_state()
    found, again = (LearnedAggregation(scale=0.25).parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    other = LearnedAggregation().parameters(replace(layer, number=0))
    shapes = dict.fromkeys(("query", "key", "value", "out"), (100, 100)) | {"up": (300, 100), "down": (100, 300)}
    for name, shape in shapes.items():
        assert found[name].shape == shape
        if name != "key":
            assert found[f"{name}_bias"].tolist() == [0.0] * shape[0]
        assert 0.99 < float(found[name].max()) * shape[1] ** 0.5 <= 1
        assert torch.equal(found[name], again[name])
        assert not torch.equal(found[name], other[name])
    assert "key_bias" not in found
    assert 0.015 < float(found["token"].std()) < 0.025
    for name in ("attend", "feed"):
        assert found[f"{name}_norm"].tolist() == [1.0] * 100
        assert found[f"{name}_norm_bias"].tolist() == [0.0] * 100
        assert found[f"{name}_scale"].tolist() == [0.25] * 100
    assert LearnedAggregation(0.001).parameters(layer)["up"].shape == (1, 100)


def test_where_it_rests_and_what_cannot_be() -> None:
    method = LearnedAggregation()
    call, _ = image_call(method, (2, 3), 1, 0, E)
    assert not method.idle(call)
    assert method.idle(replace(call, mask=Mask((Causal(),))))
    assert method.idle(replace(call, roles={"patches": call.roles["patches"]}))
    assert method.idle(replace(call, roles={"cls": Region(((0, 1),))}))
    assert method == LearnedAggregation(3.0, 1e-4)
    assert LearnedAggregation.example() == LearnedAggregation(scale=1.0)
    for value in (0.0, -1.0, math.inf):
        with pytest.raises(FieldError, match=rf"inner = {value}: must be above 0"):
            LearnedAggregation(value)
        with pytest.raises(FieldError, match=rf"scale = {value}: must be above 0"):
            LearnedAggregation(scale=value)
