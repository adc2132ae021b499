"""Cyclical: queries in loops over words and heads, the first step's gradient, and a model told its own words."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape, parameters
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.regions import PerText, Region
from heedful.methods import Cyclical

N, E, H, D = 7, 6, 2, 3
WRITTEN = [((4, 7),), ((3, 4), (6, 7))]


def case() -> tuple[Call, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    bare = Bare(Shape(h=H, g=H, q=N, k=N, d=D, e=E), dtype=torch.float64)
    params = parameters(Cyclical(), bare.shape.layer, torch.float64)
    params = {name: x + torch.randn(x.shape, generator=draw).double() / 4 for name, x in params.items()}
    roles = {"written": PerText(Region(spans) for spans in WRITTEN)}
    call = replace(bare.call, cross=True, roles=roles, params=params)
    query, stream = (torch.randn(2, *size, generator=draw).double() for size in ((H, N, D), (N, E)))
    return call, query, stream


def by_hand(query: Tensor, stream: Tensor, p: dict[str, Tensor]) -> Tensor:
    out = []
    for b, spans in enumerate(WRITTEN):
        words = [token for start, stop in spans for token in range(start, stop)]
        heads = []
        for h in range(H):
            rows = [query[b, h, token] for token in range(N)]
            for token, word in enumerate(words):
                asks = []
                for d in range(D):
                    weights = p["localizer"][h * D + d]
                    asks.append(sum(weights[e] * stream[b, word, e] for e in range(E)) + p["localizer_bias"][h * D + d])
                rows[token] = torch.stack(asks)
            heads.append(torch.stack(rows))
        out.append(torch.stack(heads))
    return torch.stack(out)


def test_words_ask_in_place_of_those_who_wrote_them_and_the_localizer_learns() -> None:
    call, query, stream = case()
    params = dict(call.params)
    leaves = [query, stream, *params.values()]
    for leaf in leaves:
        leaf.requires_grad_(True)
    method = Cyclical()
    method.listen(stream, replace(call, cross=False))
    found = method.localize(query, call)
    wanted = by_hand(query, stream, params)
    assert close(found, wanted)
    losses = [(y - 1).square().mean() for y in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_each_list_of_layers_has_its_own_words() -> None:
    call, query, stream = case()
    method = Cyclical()
    method.listen(stream, replace(call, lowest=3))
    method.listen(stream + 1, replace(call, lowest=0))
    assert close(method.localize(query, replace(call, lowest=3)), by_hand(query, stream, dict(call.params)))


def test_padding_writes_nothing() -> None:
    text = torch.arange(N)[None] >= torch.tensor([[0], [2]])
    bare = Bare(Shape(h=H, g=H, q=N, k=N, d=D, e=E), text=text, dtype=torch.float64)
    call, query, stream = case()
    call = replace(bare.call, cross=True, params=call.params, roles={"written": Region(((3, 5),))})
    method = Cyclical()
    method.listen(stream, call)
    found = method.localize(query, call)
    changed = found.ne(query).any(-1).any(1)
    assert changed.tolist() == [[True, True, *[False] * 5], [False, False, True, True, *[False] * 3]]


def test_self_attention_and_a_run_without_the_role_are_left_alone() -> None:
    call, query, stream = case()
    method = Cyclical()
    method.listen(stream, call)
    assert method.localize(query, replace(call, cross=False)) is query
    assert not method.idle(call)
    assert method.idle(replace(call, roles={}))
    assert Cyclical("said").idle(call)


def test_a_model_says_a_text_again_by_its_own_words() -> None:
    model = models.tiny("bart")
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    plain = model(input_ids=ids, decoder_input_ids=ids).logits
    layers = tuple(f"model.decoder.layers.{i}.encoder_attn" for i in range(2))
    with attach(model, Cyclical(), only=layers) as run:
        first = run(input_ids=ids, decoder_input_ids=ids).logits
        assert close_model(first, plain)
        told = torch.cat([ids, first.argmax(-1)], 1)
        unheard = run(input_ids=ids, decoder_input_ids=told).logits
        run.roles = {"written": ((5, 10),)}
        again = run(input_ids=ids, decoder_input_ids=told).logits
        assert not close_model(again[:, :5], unheard[:, :5])
        again[:, :5].square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in run.parameters())
        told[:, 5:] = (told[:, 5:] + 1) % 60
        assert not close_model(run(input_ids=ids, decoder_input_ids=told).logits[:, :5], again[:, :5])


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=40)
    found, again = (Cyclical().parameters(layer) for _ in range(2))
    assert {name: tuple(x.shape) for name, x in found.items()} == {"localizer": (20, 40), "localizer_bias": (20,)}
    other = Cyclical().parameters(replace(layer, number=0))
    for name, x in found.items():
        assert torch.equal(x, again[name])
        assert not torch.equal(x, other[name])
        assert float(x.abs().max()) <= 1 / math.sqrt(40)


def test_what_cannot_be() -> None:
    assert Cyclical() == Cyclical("written")
    assert Cyclical.example() == Cyclical("marked")
    with pytest.raises(FieldError, match=r"written = '': must name a role; .*written"):
        Cyclical("")
