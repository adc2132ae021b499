"""EfficientProbing against the authors' pooling in loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.mask import Causal, Mask
from heedful.core.regions import Region
from heedful.methods import EfficientProbing

WIDTH, TOKENS = 12, 8


def _call(cls: int) -> Call:
    """Six patches, and the class token and another around them."""
    bare = Bare(Shape(q=TOKENS, k=TOKENS), rules=())
    roles = {"patches": Region(((1, 7),), (2, 3)), "cls": Region(((cls, cls + 1),))}
    return replace(bare.call, roles=roles, mask=Mask())


def _drawn(queries: int) -> tuple[Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(queries)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    return random(2, TOKENS, WIDTH), {"query": random(queries, WIDTH), "value": random(WIDTH, WIDTH)}


def _by_hand(stream: Tensor, p: dict[str, Tensor], cls: int) -> Tensor:
    out = []
    for tokens in stream:
        patches = list(tokens[1:7])
        parts = []
        many = len(p["query"])
        for m, query in enumerate(p["query"]):
            weights = torch.stack([query @ x for x in patches]).div(math.sqrt(WIDTH)).softmax(0)
            rows = p["value"][m * WIDTH // many : (m + 1) * WIDTH // many]
            parts.append(sum(w * (rows @ x) for w, x in zip(weights, patches, strict=True)))
        pooled = torch.cat(parts)  # type: ignore[arg-type]
        out.append(torch.stack([pooled if i == cls else tokens[i] for i in range(TOKENS)]))
    return torch.stack(out)


@pytest.mark.parametrize("cls", [0, 7])
@pytest.mark.parametrize("queries", [1, 3, 12])
def test_each_query_pools_its_own_channels(queries: int, cls: int) -> None:
    stream, params = _drawn(queries)
    found = EfficientProbing(queries).pool(stream, replace(_call(cls), params=params))
    wanted = _by_hand(stream, params, cls)
    assert close(found, wanted)
    losses = [(x - 1).square().mean() for x in (found, wanted)]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, [stream, *params.values()]) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_a_frozen_model_is_probed_at_its_last_layer() -> None:
    model = models.tiny("vit", image_size=16)
    inputs = models.tiny_inputs(model)
    with attach(model, EfficientProbing(4).on(layers=1)) as run:
        assert {name.rpartition(".")[2] for name in run.state_dict()} == {"query", "value"}
        assert len(list(run.parameters())) == 2
        assert run.difference(**inputs) > 0
        run(**inputs).logits.square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in run.parameters())


def test_the_start() -> None:
    layer = Layer(number=1, heads=4, kv_heads=4, head_dim=25, value_dim=25, width=100)
    before = torch.get_rng_state()
    found, again = (EfficientProbing(10).parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert {name: tuple(x.shape) for name, x in found.items()} == {"query": (10, 100), "value": (100, 100)}
    assert 0.018 < float(found["query"].std()) < 0.022
    assert 0.099 < float(found["value"].max()) <= 0.1
    assert -0.1 <= float(found["value"].min()) < -0.099
    other = EfficientProbing(10).parameters(replace(layer, number=0))
    for name, x in found.items():
        assert torch.equal(x, again[name])
        assert not torch.equal(x, other[name])


def test_where_it_rests_and_what_cannot_be() -> None:
    call = _call(0)
    assert not EfficientProbing().idle(call)
    assert EfficientProbing().idle(replace(call, mask=Mask((Causal(),))))
    assert EfficientProbing().idle(replace(call, roles={"patches": call.roles["patches"]}))
    assert EfficientProbing().queries == 32
    assert EfficientProbing.example().queries == 4
    assert EfficientProbing(1).queries == 1
    with pytest.raises(FieldError, match=r"queries = 0: must be 1 or more"):
        EfficientProbing(0)
    with pytest.raises(FieldError, match=r"queries = 8: must divide the 36 channels of the model; .*4"):
        EfficientProbing(8).parameters(Layer(number=0, heads=4, kv_heads=4, head_dim=9, value_dim=9, width=36))
