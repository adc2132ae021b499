"""Gated heads: a learned factor on every head and token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heedful import attach, models
from heedful.conformance.bare import Bare, parameters
from heedful.conformance.tolerances import close
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, SiteError
from heedful.methods.mechanisms.gates.gated_heads import GatedHeads

LAYER = Layer(number=0, heads=4, kv_heads=2, head_dim=10, value_dim=10, width=32)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("fine_tune", [False, True])
def test_the_formula(fine_tune: bool, whole: bool) -> None:
    method = GatedHeads(start=0.25, fine_tune=fine_tune, spread=0.5, whole=whole)
    bare = Bare()
    params = parameters(method, bare.shape.layer, bare.dtype)
    hidden = bare.hidden
    heads = torch.randn(*bare.q.shape[:3], 7)
    found = method.gate(heads, replace(bare.call, hidden=hidden, params=params))
    part = hidden.shape[-1] // heads.shape[1]
    for head in range(heads.shape[1]):
        shown = hidden if whole else hidden[..., head * part : (head + 1) * part]
        logit = shown @ params["weight"][head] + params["bias"][head]
        gate = 1 / (1 + torch.exp(-logit)) / (0.25 if fine_tune else 1)
        assert close(found[:, head], heads[:, head] * gate[..., None])


def test_gates_start_where_they_should() -> None:
    plain = GatedHeads(start=0.25).parameters(LAYER)
    assert close(plain["weight"], (2 * torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) - 1) / 8**0.5)
    wide = GatedHeads(start=0.25, whole=True).parameters(LAYER)["weight"]
    assert close(wide, (2 * torch.rand(4, 32, generator=torch.Generator().manual_seed(0)) - 1) / 32**0.5)
    assert close(plain["bias"].sigmoid(), torch.full((4,), 0.25))
    assert float(GatedHeads(fine_tune=True).parameters(LAYER)["weight"].std()) < 0.002
    again = GatedHeads(start=0.25).parameters(LAYER)["weight"]
    other = GatedHeads(start=0.25).parameters(replace(LAYER, number=1))["weight"]
    assert torch.equal(plain["weight"], again)
    assert not torch.equal(plain["weight"], other)


@pytest.mark.parametrize("kind", ["llama", "odd_head_dim", "bert"])
def test_neutral_changes_no_bit_and_still_learns(kind: str) -> None:
    model = models.tiny(kind, attn_implementation="eager")
    inputs = models.tiny_inputs(model)
    run = attach(model, GatedHeads.neutral(), backend="reference")
    found = run(**inputs, labels=inputs["input_ids"])
    found.loss.backward()
    assert all(bool(p.grad.any()) for p in run.parameters())
    run.close()
    assert torch.equal(found.logits, model(**inputs).logits)
    assert not any("heedful" in name for name, _ in model.named_parameters())


def test_what_was_learned_comes_back() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with torch.no_grad(), attach(model, GatedHeads()) as run:
        for p in run.parameters():
            p.add_(torch.randn_like(p))
        learned, wanted = run.state_dict(), run(**inputs).logits
    with torch.no_grad(), attach(model, GatedHeads()) as run:
        assert not torch.equal(run(**inputs).logits, wanted)
        run.load_state_dict(learned)
        assert torch.equal(run(**inputs).logits, wanted)


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"GatedHeads.start = 1.0: must lie between 0 and 1"):
        GatedHeads(start=1.0)
    with pytest.raises(FieldError, match=r"GatedHeads.spread = -1.0: must be 0 or more"):
        GatedHeads(spread=-1)
    odd = replace(LAYER, width=33)
    with pytest.raises(FieldError, match=r"whole = False: gives each of 4 heads a slice of 33 channels.*True"):
        GatedHeads().parameters(odd)
    assert GatedHeads(whole=True).parameters(odd)["weight"].shape == (4, 33)
    bare = Bare()
    with pytest.raises(SiteError, match="layer 0: the layer's input"):
        GatedHeads().gate(bare.q, replace(bare.call, layer=0, hidden=None))
