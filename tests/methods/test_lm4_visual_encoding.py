"""LM4VisualEncoding: a block of Llama in loops over tokens and heads, and against transformers' own without places."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Causal, Fitted, Layer, Mask
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.methods import LM4VisualEncoding

N, E, INNER, D, HEADS, KV = 5, 6, 12, 4, 4, 2
NORMS = ("norm", "second_norm", "last_norm")


def method(eps: float = 1e-2) -> LM4VisualEncoding:
    draw = torch.Generator().manual_seed(2)
    block = {name: x + torch.rand(x.shape, generator=draw) / 4 for name, x in example().items()}
    return LM4VisualEncoding(Fitted(block), D, eps)


def example() -> Fitted:
    block = LM4VisualEncoding.example().block
    assert block is not None
    return block


def case(text: Tensor | None = None) -> tuple[Call, Tensor]:
    draw = torch.Generator().manual_seed(1)
    bare = Bare(Shape(q=N, k=N, e=E), text=text, dtype=torch.float64)
    params = {
        name: torch.randn(*size, generator=draw).double() for name, size in (("in", (INNER, E)), ("out", (E, INNER)))
    }
    return replace(bare.call, params=params, mask=Mask()), torch.randn(2, N, E, generator=draw).double()


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x * x).sum() / len(x) + eps) ** 0.5 * weight


def by_hand(x: Tensor, p: dict[str, Tensor], block: Fitted, eps: float, seen: list[int]) -> Tensor:
    w = {name: each.double() for name, each in block.items()}
    tokens = [p["in"] @ token for token in x]
    ys = [normed(token, w["norm"], eps) for token in tokens]
    q, k, v = ([w[name] @ y for y in ys] for name in ("query", "key", "value"))
    found = []
    for i, token in enumerate(tokens):
        heads = []
        for h in range(HEADS):
            own, shared = slice(h * D, (h + 1) * D), slice(h // (HEADS // KV) * D, (h // (HEADS // KV) + 1) * D)
            weights = torch.stack([torch.exp(q[i][own] @ k[j][shared] / math.sqrt(D)) for j in seen])
            heads.append(sum(weights[n] / weights.sum() * v[j][shared] for n, j in enumerate(seen)))
        token = token + w["out"] @ torch.cat(heads)
        y = normed(token, w["second_norm"], eps)
        gate = w["gate"] @ y
        token = token + w["down"] @ (gate / (1 + torch.exp(-gate)) * (w["up"] @ y))
        found.append(p["out"] @ normed(token, w["last_norm"], eps))
    return torch.stack(found)


@pytest.mark.parametrize("eps", [1e-2, 0.5])
def test_the_block_and_the_first_step_of_the_maps_around_it(eps: float) -> None:
    call, x = case()
    given, params = method(eps), dict(call.params)
    leaves = [x, *params.values()]
    for leaf in leaves:
        leaf.requires_grad_(True)
    found = given.encode(x, call)
    wanted = torch.stack([by_hand(tokens, params, given._block, eps, [*range(N)]) for tokens in x])
    assert close(found, wanted)
    losses = [(y - 1).square().mean() for y in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_padding_is_not_seen() -> None:
    call, x = case(torch.arange(N)[None] >= torch.tensor([[0], [2]]))
    given = method()
    found = given.encode(x, call)
    for b, seen in enumerate(([*range(N)], [*range(2, N)])):
        wanted = by_hand(x[b], dict(call.params), given._block, 1e-2, seen)
        assert close(found[b, seen], wanted[seen])


def test_it_is_the_language_models_own_block_without_places() -> None:
    language = models.tiny("llama").model
    given = LM4VisualEncoding.of(language.layers[-1], language.norm)
    assert given.head_dim == language.layers[-1].self_attn.head_dim
    assert given.eps == language.norm.variance_epsilon
    x = torch.randn(2, 5, len(given._block["norm"]), generator=torch.Generator().manual_seed(0))
    still = (torch.ones(1, 5, given.head_dim), torch.zeros(1, 5, given.head_dim))
    wanted = language.norm(language.layers[-1](x, position_embeddings=still, attention_mask=torch.zeros(1, 1, 5, 5)))
    assert close_model(given.through(x, case()[0]), wanted[0] if isinstance(wanted, tuple) else wanted)


def test_a_model_is_served_behind_its_last_layer_and_the_maps_learn() -> None:
    model = models.tiny("vit", image_size=16)
    inputs = models.tiny_inputs(model)
    plain = model(**inputs, output_hidden_states=True).hidden_states
    with attach(model, LM4VisualEncoding.example()) as run:
        assert len(list(run.parameters())) == 2
        found = run(**inputs, output_hidden_states=True).hidden_states
        assert close_model(found[-2], plain[-2])
        assert not close_model(found[-1], plain[-1])
        found[-1].square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in run.parameters())


def test_what_it_starts_with_and_where_it_acts() -> None:
    layer = Layer(number=2, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=40, highest=2)
    found, again = (LM4VisualEncoding.example().parameters(layer) for _ in range(2))
    assert {name: tuple(x.shape) for name, x in found.items()} == {"in": (12, 40), "out": (40, 12)}
    other = LM4VisualEncoding.example().parameters(replace(layer, number=0, highest=0))
    for name, x in found.items():
        assert torch.equal(x, again[name])
        assert not torch.equal(x, other[name])
    assert LM4VisualEncoding.example().parameters(replace(layer, number=1)) == {}
    call, _ = case()
    assert not LM4VisualEncoding.example().idle(call)
    assert LM4VisualEncoding.example().idle(replace(call, depth=2))
    assert not LM4VisualEncoding.example().idle(replace(call, depth=2, highest=0))
    for other in (replace(call, mask=Mask((Causal(),))), replace(call, cross=True)):
        assert LM4VisualEncoding.example().idle(other)


def test_what_cannot_be() -> None:
    call, x = case()
    assert LM4VisualEncoding() == LM4VisualEncoding(None, 64, 1e-5)
    with pytest.raises(
        FieldError, match=r"block = None: is not there yet: take one from a language model; .*layers\[-1\]"
    ):
        LM4VisualEncoding().encode(x, call)
    for head_dim in (0, -1):
        with pytest.raises(FieldError, match=rf"head_dim = {head_dim}: must be 1 or more; .*64"):
            LM4VisualEncoding(head_dim=head_dim)
    LM4VisualEncoding(head_dim=1)
    for eps in (0.0, 1.0):
        with pytest.raises(FieldError, match=rf"eps = {eps}: must lie between 0 and 1; .*1e-05"):
            LM4VisualEncoding(eps=eps)
    with pytest.raises(FieldError, match=r"head_dim = 3: must divide the 16 rows of query"):
        LM4VisualEncoding(example(), 3)
    with pytest.raises(FieldError, match=r"head_dim = 16: must divide the 8 rows of key"):
        LM4VisualEncoding(example(), 16)
    for missing in ("gate", "last_norm"):
        with pytest.raises(FieldError, match=rf"has no {missing}; take it from a language model"):
            LM4VisualEncoding(Fitted({name: x for name, x in example().items() if name != missing}), 4)
    bart = models.tiny("bart").model.decoder
    with pytest.raises(
        FieldError, match=r"block = 'BartDecoderLayer': must be a block of Llama's form; what differs is"
    ):
        LM4VisualEncoding.of(bart.layers[0], bart.layernorm_embedding)
    assert set(LM4VisualEncoding.example()._block) >= set(NORMS)
