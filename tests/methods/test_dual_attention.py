"""Dual attention: relational heads in loops over pairs of tokens, sensory ones as they are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Causal, Mask, Padding
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods import DualAttention
from heedful.methods.mechanisms.score import dual_attention
from tests.by_hand import in_pieces

TEXT = torch.ones(2, 9, dtype=torch.bool)
TEXT[0, :3] = False
SHAPE = Shape(q=9, k=9, dv=6)
METHOD = DualAttention(3, 2, 5)


def _drawn(causal: bool, padded: bool) -> tuple[Bare, Call, dict[str, Tensor]]:
    bare = Bare(SHAPE, dtype=torch.float64, text=TEXT if padded else None)
    draw = torch.Generator().manual_seed(1)
    p = {
        name: w.double() + torch.randn(w.shape, generator=draw) / 4
        for name, w in METHOD.parameters(SHAPE.layer).items()
    }
    rules = ((Causal(),) if causal else ()) + ((Padding(TEXT),) if padded else ())
    return bare, replace(bare.call, mask=Mask(rules), params=p, state=State(), roles={}), p


def _by_hand(bare: Bare, p: dict[str, Tensor], causal: bool, text: Tensor) -> Tensor:
    out = torch.zeros(2, 4, 9, 6, dtype=torch.float64)
    size = len(p["from"]) // 2  # of a product
    for b in range(2):
        tokens = [i for i in range(9) if text[b, i]]
        x = bare.hidden[b]
        symbols = {}
        for j in tokens:
            asked = p["templates"] @ (p["asked"] @ x[j] + p["asked_bias"]) / math.sqrt(24)
            symbols[j] = p["symbol"] @ (p["library"].T @ asked.softmax(0))
        for h in range(4):
            for i in tokens:
                seen = [j for j in tokens if j <= i or not causal]
                a = torch.stack([bare.q[b, h, i] @ bare.k[b, h // 2, j] for j in seen]).div(math.sqrt(8)).softmax(0)
                if h == 0:
                    out[b, h, i] = a @ bare.v[b, 0, seen]
                    continue
                for w, j in zip(a, seen, strict=True):
                    r = []
                    for n in range(2):
                        part = slice(n * size, (n + 1) * size)
                        r.append((p["from"][part] @ x[i]) @ (p["to"][part] @ x[j]) / math.sqrt(size))
                    mine = slice((h - 1) * 6, h * 6)
                    out[b, h, i] = out[b, h, i] + w * (p["relation"][h - 1] @ torch.stack(r) + symbols[j][mine])
    return out


@pytest.mark.parametrize("rows", [2, 256])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_loss_and_gradients(causal: bool, padded: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_attention, "ROWS", rows)
    bare, call, p = _drawn(causal, padded)
    leaves = [*p.values(), bare.q, bare.k, bare.v, bare.hidden]
    for x in leaves:
        x.requires_grad_(True)
    text = TEXT if padded else torch.ones_like(TEXT)
    wanted = _by_hand(bare, p, causal, text)
    found = METHOD.attend((bare.q, bare.k, bare.v), call) * text[:, None, :, None]
    assert close(found, wanted)
    losses = [(y - 1).pow(2).mean() for y in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_call_by_call() -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=12)["input_ids"]
    with attach(model, METHOD) as run, torch.no_grad():
        whole = run(input_ids=ids).logits
        parts, _ = in_pieces(run, ids, (7, 1, 4))
    assert close_model(parts, whole)


def test_tokens_that_were_read_without_it_are_not_seen() -> None:
    bare, call, p = _drawn(causal=True, padded=False)
    late = replace(call, queries=Positions.row(6, 3), hidden=bare.hidden[:, 6:])
    found = METHOD.attend((bare.q[:, :, 6:], bare.k, bare.v), late)
    text = torch.ones_like(TEXT)
    text[:, :6] = False
    assert close(found, _by_hand(bare, p, True, text)[:, :, 6:])


def test_the_start() -> None:
    layer = Layer(0, 4, 2, 32, 48, 256)
    p, again = (DualAttention(3, 2, 50).parameters(layer) for _ in range(2))
    shapes = {
        "asked": (256, 256), "asked_bias": (256,), "templates": (50, 256), "library": (50, 256),
        "symbol": (144, 256), "from": (96, 256), "to": (96, 256), "relation": (3, 48, 2),
    }  # fmt: skip
    assert {name: tuple(x.shape) for name, x in p.items()} == shapes
    other = DualAttention(3, 2, 50).parameters(replace(layer, number=1))
    for name, x in p.items():
        assert torch.equal(x, again[name])
        assert not torch.equal(x, other[name])
        if name in ("templates", "library"):
            assert 0.97 < float(x.std()) < 1.03
        else:
            bound = 1 / math.sqrt(48 * 2 if name == "relation" else 256)
            assert 0.94 * bound < float(x.max()) <= bound
            assert -bound <= float(x.min()) < -0.94 * bound
    assert DualAttention(9, 100).parameters(layer)["relation"].shape == (4, 48, 100)
    assert DualAttention(1, 100).parameters(layer)["from"].shape == (100, 256)


def test_errors() -> None:
    bare, call, _ = _drawn(causal=True, padded=False)
    with pytest.raises(SiteError, match="layer 0: relations are of the layer's input, and none is handed"):
        METHOD.attend((bare.q, bare.k, bare.v), replace(call, hidden=None))
    index = torch.arange(9).expand(1, 2, -1)
    with pytest.raises(SiteError, match="layer 0: heads hold unlike tokens; keep the cache whole"):
        METHOD.attend((bare.q, bare.k, bare.v), replace(call, keys=Positions(index, index)))
    for settings in ({"heads": 0}, {"relations": 0}, {"symbols": 0}):
        with pytest.raises(FieldError, match=r"DualAttention\..* = 0: must be 1 or more"):
            DualAttention(**settings)
