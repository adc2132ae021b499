"""Context-aware cross-attention, against its two patterns token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import FieldError, Layer, SiteError
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.mask import Padding
from heedful.methods import ContextAwareCrossAttention

TEXT = torch.ones(2, 13, dtype=torch.bool)
TEXT[1, 8:] = False


def _drawn() -> tuple[Bare, dict[str, Tensor]]:
    bare, draw = Bare(Shape(q=6, k=13), dtype=torch.float64, rules=(Padding(TEXT),)), torch.Generator().manual_seed(1)
    bare.call = replace(bare.call, cross=True)
    params = {
        "gate": torch.randn(1, 8, generator=draw, dtype=torch.float64),
        "gate_bias": torch.randn(1, generator=draw, dtype=torch.float64),
    }
    return bare, params


def _head(q: Tensor, k: Tensor, v: Tensor, p: dict[str, Tensor], window: int) -> Tensor:
    """What one token's head gets of a source of nothing but `k` and `v`."""
    q = q / math.sqrt(len(q))
    energy = [q @ key for key in k]
    peak = max(range(len(k)), key=lambda j: float(energy[j].detach()))
    near = [j for j in range(len(k)) if peak - window <= j <= peak + window]
    whole = torch.stack(energy).softmax(0) @ v
    part = torch.stack([energy[j] for j in near]).softmax(0) @ v[near]
    gate = 1 / (1 + torch.exp(-(p["gate"][0] @ q + p["gate_bias"][0])))
    return gate * whole + (1 - gate) * part


def _by_hand(bare: Bare, p: dict[str, Tensor], window: int) -> Tensor:
    out = []
    for b in range(2):
        source = int(TEXT[b].sum())
        k, v = bare.k[b, :, :source], bare.v[b, :, :source]
        out += [_head(bare.q[b, h, i], k[h // 2], v[h // 2], p, window) for h in range(4) for i in range(bare.shape.q)]
    return torch.stack(out).view_as(bare.q)


@pytest.mark.parametrize(("backend", "rows"), [("reference", None), ("tiled", 4)])
@pytest.mark.parametrize("window", [0, 1, 3, 20])
def test_a_token_sees_all_of_the_source_and_a_part(window: int, backend: str, rows: int | None) -> None:
    bare, params = _drawn()
    found, _ = bare.run(ContextAwareCrossAttention(window), backend, rows, params)
    assert close(found, _by_hand(bare, params, window))


def test_the_first_steps_loss_and_gradient() -> None:
    bare, params = _drawn()
    leaves = [*params.values(), bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    method = ContextAwareCrossAttention(2)
    losses = [x.pow(2).sum() for x in (bare.run(method, "tiled", 4, params)[0], _by_hand(bare, params, 2))]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_a_gate_of_one_is_global_attention() -> None:
    bare, params = _drawn()
    open_gate = {"gate": params["gate"] * 0, "gate_bias": params["gate_bias"] * 0 + 100}
    plain = (bare.q @ bare.k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~TEXT[:, None, None], -torch.inf)
    found, _ = bare.run(ContextAwareCrossAttention(0), "reference", params=open_gate)
    assert close(found, plain.softmax(-1) @ bare.v.repeat_interleave(2, 1))


def test_a_source_that_is_padded_on_its_left() -> None:
    """Windows count the places of the text, as of a row that begins with it."""
    text = torch.ones(1, 9, dtype=torch.bool)
    text[0, :3] = False
    bare = Bare(Shape(b=1, q=9, k=9), dtype=torch.float64, text=text, rules=(Padding(text),))
    bare.call = replace(bare.call, cross=True)
    _, params = _drawn()
    found, _ = bare.run(ContextAwareCrossAttention(1), "reference", params=params)
    for h in range(4):
        for i in range(3, 9):
            want = _head(bare.q[0, h, i], bare.k[0, h // 2, 3:], bare.v[0, h // 2, 3:], params, 1)
            assert close(found[0, h, i], want)


def test_rows_of_earlier_calls_that_an_edit_beside_it_looks_at_are_not_its_own() -> None:
    bare, params = _drawn()
    call = replace(bare.call, params=params, query=bare.q)
    tile = call.tile(slice(1, 5), slice(0, 13))
    found = ContextAwareCrossAttention(3).gate(replace(tile, earlier=2, rows=slice(3, 7)))
    assert close(found, ContextAwareCrossAttention(3).gate(tile))
    assert found.shape == (2, 4, 4, 1)
    assert ContextAwareCrossAttention(3).gate(call).shape == (2, 4, 6, 1)


def test_in_a_model_padding_is_no_part_of_the_source() -> None:
    model = models.tiny("bart").eval()
    ids = torch.arange(3, 19)[None]
    target = ids[:, 2:7]
    padded = torch.cat([ids, torch.full((1, 5), 1)], 1)
    mask = (torch.arange(21) < 16)[None].long()
    only = ("model.decoder.layers.0.encoder_attn",)
    with attach(model, ContextAwareCrossAttention(1), only=only) as run, torch.no_grad():
        alone = run(input_ids=ids, decoder_input_ids=target).logits
        beside = run(input_ids=padded, attention_mask=mask, decoder_input_ids=target).logits
    assert close_model(beside, alone)


def test_the_start() -> None:
    layer = Layer(2, 4, 2, 100, 8, 25)
    found = ContextAwareCrossAttention().parameters(layer)
    assert {name: tuple(x.shape) for name, x in found.items()} == {"gate": (1, 100), "gate_bias": (1,)}
    random = torch.Generator().manual_seed(2)
    assert close(found["gate"], (2 * torch.rand((1, 100), generator=random) - 1) / 10)
    assert close(found["gate_bias"], (2 * torch.rand(1, generator=random) - 1) / 10)


def test_errors() -> None:
    bare, _ = _drawn()
    assert ContextAwareCrossAttention().idle(Bare().call)
    assert not ContextAwareCrossAttention().idle(bare.call)
    with pytest.raises(FieldError, match=r"ContextAwareCrossAttention.window = -1: must be 0 or more"):
        ContextAwareCrossAttention(-1)
    with pytest.raises(SiteError, match="layer 0: the gate reads queries, and none are handed"):
        ContextAwareCrossAttention().gate(replace(bare.call, params=_drawn()[1]))
