"""GlobalLocalCrossAttention against rollout and attention, vector by vector."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Causal, Layer, Mask
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods import GlobalLocalCrossAttention
from tests.images_by_hand import attended_by_hand, image_call, normed_by_hand

HEADS, E, N = 4, 8, 9  # of 2 x 3 patches, after a class token and before two others


def _drawn() -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(1)
    params = GlobalLocalCrossAttention().parameters(Layer(0, HEADS, HEADS, 2, 2, E))
    p = {name: (x + torch.randn(x.shape, generator=draw) / 4).double() for name, x in params.items()}
    maps = [torch.randn(2, HEADS, N, N, generator=draw, dtype=torch.float64).softmax(-1) for _ in range(2)]
    return p, maps, torch.randn(2, N, E, generator=draw, dtype=torch.float64)


def _rank(maps: list[Tensor]) -> list[float]:
    """How much of each token is mixed into the first, by one image's maps `[h n n]`."""
    rolled = [[float(i == j) for j in range(N)] for i in range(N)]
    for weights in maps:
        mean = weights.sum(0) / HEADS
        rolled = [
            [sum((0.5 * float(mean[i, k]) + 0.5 * (i == k)) * rolled[k][j] for k in range(N)) for j in range(N)]
            for i in range(N)
        ]
    return rolled[0]


def _by_hand(x: Tensor, rank: list[float], count: int, p: dict[str, Tensor]) -> Tensor:
    best = sorted(range(1, 7), key=lambda i: -rank[i])[:count]
    seen = [normed_by_hand(y, p, "first") for y in x]
    found = attended_by_hand(p, "look", [seen[i] for i in best], seen, HEADS)
    total = torch.zeros(E, dtype=torch.float64)
    for i, added in zip(best, found, strict=True):
        one = x[i] + added
        up = p["up"] @ normed_by_hand(one, p, "second") + p["up_bias"]
        total = total + one + p["down"] @ (up * (1 + torch.erf(up / math.sqrt(2))) / 2) + p["down_bias"]
    return torch.stack([x[0] + total / count, *x[1:]])


@pytest.mark.parametrize(("share", "count"), [(0.3, 2), (0.1, 1), (1.0, 6), (1 / 3, 2)])
def test_the_foremost_patches_ask_all(share: float, count: int) -> None:
    method = GlobalLocalCrossAttention(share)
    call, _ = image_call(method, (2, 3), 1, 2, E)
    p, maps, x = _drawn()
    leaves = [leaf.requires_grad_() for leaf in (x, *p.values())]
    call = replace(call, lowest=1, depth=4, highest=2)
    method.roll(maps[0], replace(call, layer=0, lowest=0))  # of another list of layers
    for layer, weights in enumerate(maps, 1):
        method.roll(weights, replace(call, layer=layer))
    ranks = [_rank([m[b] for m in maps]) for b in range(2)]
    assert close(call.state.forward["rolled 2"][:, 0], torch.tensor(ranks, dtype=torch.float64))
    assert method.add(x, replace(call, layer=1)) is x
    found = method.add(x, replace(call, layer=2, params=p))
    wanted = torch.stack([_by_hand(x[b], ranks[b], count, p) for b in range(2)])
    assert close(found, wanted)
    losses = [(y - 1).square().mean() for y in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_a_model_is_read_in_all_layers_and_learns() -> None:
    model = models.tiny("vit", image_size=16)
    inputs = models.tiny_inputs(model)
    plain = model(**inputs).logits
    with attach(model, GlobalLocalCrossAttention.example()) as run:
        out = run(**inputs)
        assert not close_model(out.logits, plain)
        out.logits.square().sum().backward()
        grads = [p.grad for name, p in model.named_parameters() if "heedful" in name]
        assert len(grads) == 12
        assert all(g is not None and bool(g.any()) for g in grads)


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=20, highest=1)
    before = torch.get_rng_state()
    found, again = (GlobalLocalCrossAttention().parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    shapes = {"first": (20,), "look": (60, 20), "look_out": (20, 20), "second": (20,), "up": (80, 20), "down": (20, 80)}
    for name, shape in shapes.items():
        assert found[name].shape == shape
        assert found[f"{name}_bias"].shape == shape[:1]
    assert len(found) == 2 * len(shapes)
    other = GlobalLocalCrossAttention().parameters(replace(layer, number=0, highest=0))
    for name, x in found.items():
        assert torch.equal(x, again[name])
        assert torch.equal(x, other[name]) == name.startswith(("first", "second"))
    for name in ("first", "second"):
        assert found[name].tolist() == [1.0] * 20
        assert found[f"{name}_bias"].tolist() == [0.0] * 20
    for highest in (0, 2):  # the last layer alone has any
        assert GlobalLocalCrossAttention().parameters(replace(layer, highest=highest)) == {}


def test_where_it_rests_and_what_cannot_be() -> None:
    method = GlobalLocalCrossAttention()
    call, _ = image_call(method, (2, 3), 1, 0, E)
    assert not method.idle(call)
    assert method.idle(replace(call, mask=Mask((Causal(),))))
    assert method.idle(replace(call, roles={"patches": call.roles["patches"]}))
    assert method.whole_map
    assert method == GlobalLocalCrossAttention(0.1)
    assert GlobalLocalCrossAttention.example() == GlobalLocalCrossAttention(0.5)
    assert GlobalLocalCrossAttention(1.0).share == 1
    for share in (0.0, -0.5, 1.5):
        with pytest.raises(FieldError, match=rf"share = {share}: must be above 0, and 1 at most; .*0.1"):
            GlobalLocalCrossAttention(share)
