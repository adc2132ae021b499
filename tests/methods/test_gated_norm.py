"""GatedNorm against the paper's formula, number by number, and a llama written out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.methods import GatedNorm
from tests.by_hand import causal_map, heads_of


def by_hand(y: list[float], down: list[list[float]], up: list[list[float]]) -> list[float]:
    low = [sum(w * a for w, a in zip(row, y, strict=True)) for row in down]
    low = [z / (1 + math.exp(-z)) for z in low]
    gates = [1 / (1 + math.exp(-sum(w * z for w, z in zip(row, low, strict=True)))) for row in up]
    return [g * a for g, a in zip(gates, y, strict=True)]


def test_the_formula() -> None:
    bare = Bare(dtype=torch.float64)
    down, up = torch.randn(3, 24).double(), torch.randn(24, 3).double()
    found = GatedNorm(3).gate(bare.hidden, replace(bare.call, params={"down": down, "up": up}))
    wanted = [[by_hand(y.tolist(), down.tolist(), up.tolist()) for y in text] for text in bare.hidden]
    assert close(found, torch.tensor(wanted, dtype=torch.float64))


def test_half_precision_stays() -> None:
    bare = Bare()
    call = replace(bare.call, params=GatedNorm().parameters(Layer(0, 4, 2, 8, 8, 24)))
    found = GatedNorm().gate(bare.hidden.bfloat16(), call)
    assert found.dtype == torch.bfloat16


def test_the_first_step_s_loss_and_gradient() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with attach(model, GatedNorm(3)) as run:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        learned = run.parameters()
    mine = [p.detach().clone().requires_grad_() for p in learned]
    downs, ups = ([p for p in mine if p.shape[i] == 3] for i in (0, 1))
    base = model.model
    x = base.embed_tokens(ids)
    cos, sin = (y[:, None] for y in base.rotary_emb(x, torch.arange(ids.shape[1])[None]))
    d = cos.shape[-1]

    def rotate(y: Tensor) -> Tensor:
        return y * cos + torch.cat([-y[..., d // 2 :], y[..., : d // 2]], -1) * sin

    for layer, down, up in zip(base.layers, downs, ups, strict=True):
        y, part = layer.input_layernorm(x), layer.self_attn
        low = y @ down.T
        y = y / (1 + torch.exp(-(low / (1 + torch.exp(-low))) @ up.T))
        q, k, v = (p(y).unflatten(-1, (-1, d)).transpose(1, 2) for p in (part.q_proj, part.k_proj, part.v_proj))
        heads = heads_of(causal_map(rotate(q), rotate(k)), v)
        x = x + part.o_proj(heads.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits = model.lm_head(base.norm(x))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert close(loss, wanted)
    wanted.backward()
    for got, tensor in zip(learned, mine, strict=True):
        assert got.grad is not None
        assert tensor.grad is not None
        assert bool(got.grad.any())
        assert close(got.grad, tensor.grad)


def test_it_starts_as_linear_maps() -> None:
    found = GatedNorm().parameters(Layer(3, 4, 2, 8, 6, 32))
    draw = torch.Generator().manual_seed(3)
    assert close(found["down"], (2 * torch.rand(16, 32, generator=draw) - 1) / math.sqrt(32))
    assert close(found["up"], (2 * torch.rand(32, 16, generator=draw) - 1) / math.sqrt(16))


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"rank = 0: must be 1 or more"):
        GatedNorm(0)
    GatedNorm(1)
