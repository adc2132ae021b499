"""LlamaFusion against a llama whose image tokens have weights of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import FieldError, Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close_model
from heedful.core.regions import Region
from heedful.methods import LlamaFusion
from tests.by_hand import in_pieces, turning

N = 12
IDS = torch.randint(3, 100, (2, N), generator=torch.Generator().manual_seed(1))
SPANS = ((2, 5), (6, 10))
IMAGE = torch.tensor([any(a <= i < b for a, b in SPANS) for i in range(N)])


def _sees(i: int, j: int, spans: tuple[tuple[int, int], ...] = SPANS) -> bool:
    return j <= i or any(a <= i < b and a <= j < b for a, b in spans)


def _by_hand(model: Any, ids: Tensor, added: dict[str, Tensor], image: Tensor = IMAGE, spans: Any = SPANS) -> Tensor:
    """Logits of a llama each of whose tokens is projected by the weights of its kind, one by one."""
    base = model.model
    x = base.embed_tokens(ids)
    n = ids.shape[1]
    turned, d = turning(model, torch.arange(n)[None]), model.config.head_dim
    for number, layer in enumerate(base.layers):
        part, y = layer.self_attn, layer.input_layernorm(x)
        maps = {"query": part.q_proj, "key": part.k_proj, "value": part.v_proj}
        made = {}
        for name, linear in maps.items():
            own = linear.weight + added[f"0.{number}.{name}"]
            rows = [y[:, i] @ (own if image[i] else linear.weight).T for i in range(n)]
            made[name] = torch.stack(rows, 1).unflatten(-1, (-1, d)).transpose(1, 2)
        q, k, v = turned(made["query"]), turned(made["key"]), made["value"]
        k, v = (z.repeat_interleave(q.shape[1] // k.shape[1], 1) for z in (k, v))
        table = torch.tensor([[_sees(i, j, spans) for j in range(n)] for i in range(n)])
        heads = (q @ k.mT / d**0.5).masked_fill(~table, -torch.inf).softmax(-1) @ v
        heads = heads.transpose(1, 2).flatten(2)
        before = torch.eye(heads.shape[-1]) + added[f"0.{number}.heads"]
        outs = [heads[:, i] @ ((part.o_proj.weight @ before) if image[i] else part.o_proj.weight).T for i in range(n)]
        x = x + torch.stack(outs, 1)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(base.norm(x))


def _drawn(run: Any) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in run.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) / 8)
    return {name: p.detach().clone().requires_grad_() for name, p in run.state_dict().items()}


def test_the_first_steps_loss_and_gradient() -> None:
    model = models.tiny("llama")
    with attach(model, LlamaFusion(), roles={"image": SPANS}) as run:
        mine = _drawn(run)
        logits = _by_hand(model, IDS, mine)
        assert close_model(run(IDS).logits, logits)
        want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        found = run(IDS, labels=IDS, use_cache=False).loss
        found.backward()
        assert close_model(found.detach(), want.detach())
        slopes = torch.autograd.grad(want, list(mine.values()))
        for p, slope in zip(run.parameters(), slopes, strict=True):
            assert bool(slope.any())
            assert close_model(p.grad, slope)


def test_each_text_has_its_own_images() -> None:
    model = models.tiny("llama")
    roles = [{"picture": SPANS}, {"picture": ((0, 3),)}]
    with attach(model, LlamaFusion("picture"), roles=roles) as run, torch.no_grad():
        mine = _drawn(run)
        found = run(IDS).logits
        assert close_model(found[:1], _by_hand(model, IDS[:1], mine))
        second = _by_hand(model, IDS[1:], mine, torch.arange(N) < 3, ((0, 3),))
        assert close_model(found[1:], second)


def test_texts_are_what_they_were() -> None:
    model = models.tiny("llama")
    with torch.no_grad():
        plain = model(IDS).logits
    with attach(model, LlamaFusion(spread=0.5), roles={"image": SPANS}) as run, torch.no_grad():
        found = run(IDS).logits
        assert close_model(found[:, :2], plain[:, :2])
        assert not close_model(found[:, 2:], plain[:, 2:])
    with (
        pytest.warns(UserWarning, match="changed nothing"),
        attach(model, LlamaFusion(spread=0.5)) as run,
        torch.no_grad(),
    ):
        assert torch.equal(run(IDS).logits, plain)


def test_a_cache_goes_on_behind_images() -> None:
    model = models.tiny("llama").eval()
    with attach(model, LlamaFusion(spread=0.2), roles={"image": SPANS}) as run, torch.no_grad():
        assert close_model(in_pieces(run, IDS, (5, 5, 1, 1))[0], run(IDS).logits)


def test_tokens_that_were_cached_without_it_keep_the_layers_own() -> None:
    bare = Bare(Shape(q=3, k=9), dtype=torch.float64)
    method = LlamaFusion(spread=0.5)
    params = {name: x.double() for name, x in method.parameters(bare.shape.layer).items()}
    call = replace(bare.call, params=params, roles={"image": Region(((0, 8),))})  # but for the last token
    for given, found in ((bare.k, method.answer_to(bare.k, call)), (bare.v, method.hand(bare.v, call))):
        assert torch.equal(found[:, :, :6], given[:, :, :6])
        assert torch.equal(found[:, :, 8], given[:, :, 8])
        assert not bool((found[:, :, 6:8] == given[:, :, 6:8]).any())


def test_the_start() -> None:
    layer = Layer(1, 4, 2, 8, 6, 40)
    found = LlamaFusion(spread=0.3).parameters(layer)
    shapes = {"query": (32, 40), "key": (16, 40), "value": (12, 40), "heads": (24, 24)}
    assert {name: tuple(x.shape) for name, x in found.items()} == shapes
    assert 0.27 < float(found["query"].std()) < 0.33
    assert torch.equal(found["key"], LlamaFusion(spread=0.3).parameters(layer)["key"])
    assert not any(bool(x.any()) for x in LlamaFusion().parameters(layer).values())


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"LlamaFusion.role = '': must name a role"):
        LlamaFusion("")
    for spread in (-0.1, float("inf")):
        with pytest.raises(FieldError, match=r"LlamaFusion.spread = .*: must be 0 or more"):
            LlamaFusion(spread=spread)
