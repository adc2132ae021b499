"""HistoGraph against attention over layers and patches, vector by vector."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Causal, Layer, Mask
from heedful.conformance.tolerances import close
from heedful.methods import HistoGraph
from tests.images_by_hand import attended_by_hand, image_call, image_of, normed_by_hand

HEADS, GRID = 4, (2, 3)


def _place(layer: int, e: int) -> Tensor:
    turns = [layer / 10_000 ** (2 * (i // 2) / e) for i in range(e)]
    return torch.tensor([math.cos(x) if i % 2 else math.sin(x) for i, x in enumerate(turns)], dtype=torch.float64)


def _by_hand(states: list[Tensor], p: dict[str, Tensor]) -> Tensor:
    """Of one image's states `[n e]` in all layers, the class token first."""
    e = states[0].shape[1]
    past = []
    for i, state in enumerate(states):
        patches = image_of(state, GRID, 1).values()
        past.append([p["embed"] @ x + p["embed_bias"] + _place(i, e) for x in patches])
    scores = []
    for layer in past:
        asked = [(p["query"] @ last) @ (p["key"] @ x) / e**0.5 for last, x in zip(past[-1], layer, strict=True)]
        scores.append(sum(asked) / len(asked))
    shares = [score / sum(scores) for score in scores]
    nodes = [sum(share * x for share, x in zip(shares, one, strict=True)) for one in zip(*past, strict=True)]
    found = attended_by_hand(p, "nodes", nodes, nodes, HEADS)
    nodes = [normed_by_hand(x + y, p, "norm") for x, y in zip(nodes, found, strict=True)]
    return torch.stack([sum(nodes) / len(nodes), *states[-1][1:]])


def test_a_patch_asks_what_it_was() -> None:
    method = HistoGraph()
    call, first = image_call(method, GRID, 1, 0, 8)
    params = method.parameters(Layer(0, HEADS, HEADS, 2, 2, 8))
    draw = torch.Generator().manual_seed(2)
    p = {name: (x + torch.randn(x.shape, generator=draw) / 4).double() for name, x in params.items()}
    states = [first, *(torch.randn(first.shape, generator=draw, dtype=torch.float64) for _ in range(3))]
    leaves = [x.requires_grad_() for x in (*states, *p.values())]
    method.begin(states[0], call := replace(call, depth=4, highest=2))
    method.begin(states[1], replace(call, lowest=3))  # of another list of layers
    for layer in range(2):
        assert method.read_out(states[layer + 1], replace(call, layer=layer)) is states[layer + 1]
    found = method.read_out(states[3], replace(call, layer=2, params=p))
    wanted = torch.stack([_by_hand([state[b] for state in states], p) for b in range(2)])
    assert close(found, wanted)
    losses = [(x - 1).square().mean() for x in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_of_an_odd_width_the_last_cosine_is_left_out() -> None:
    from heedful.methods.mechanisms.pooling.histo_graph import _places

    history = torch.zeros(2, 4, 3, 5, dtype=torch.float64)
    assert close(_places(history), torch.stack([_place(i, 5) for i in range(3)]))


def test_a_model_is_read_behind_its_last_layer_and_learns() -> None:
    model = models.tiny("vit", image_size=16)
    inputs = models.tiny_inputs(model)
    with attach(model, HistoGraph.example()) as run:
        run(**inputs).logits.square().sum().backward()
        grads = [p.grad for name, p in model.named_parameters() if "heedful" in name]
        assert len(grads) == 10
        assert all(g is not None and bool(g.any()) for g in grads)


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=20, highest=1)
    before = torch.get_rng_state()
    found, again = (HistoGraph().parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    shapes = {
        "embed": (20, 20), "embed_bias": (20,), "query": (20, 20), "key": (20, 20), "nodes": (60, 20),
        "nodes_bias": (60,), "nodes_out": (20, 20), "nodes_out_bias": (20,), "norm": (20,), "norm_bias": (20,),
    }  # fmt: skip
    assert {name: tuple(x.shape) for name, x in found.items()} == shapes
    other = HistoGraph().parameters(replace(layer, number=0, highest=0))
    for name, x in found.items():
        assert torch.equal(x, again[name])
        assert torch.equal(x, other[name]) == name.startswith("norm")
    assert found["norm"].tolist() == [1.0] * 20
    assert found["norm_bias"].tolist() == [0.0] * 20
    for highest in (0, 2):  # the last layer alone has any
        assert HistoGraph().parameters(replace(layer, highest=highest)) == {}


def test_where_it_rests() -> None:
    method = HistoGraph()
    call, _ = image_call(method, GRID, 1, 0, 8)
    assert not method.idle(call)
    assert method.idle(replace(call, mask=Mask((Causal(),))))
    assert method.idle(replace(call, roles={"patches": call.roles["patches"]}))
