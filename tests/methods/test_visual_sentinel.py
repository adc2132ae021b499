"""The visual sentinel: a slot beside the keys, against the paper's equations token by token."""

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
from heedful.methods import VisualSentinel

UNITS = 5
TEXT = torch.ones(2, 9, dtype=torch.bool)
TEXT[1, 6:] = False
SHAPES = {
    "gate": (24, 24), "memory": (24, 24), "of_query": (UNITS, 8), "of_key": (UNITS, 8),
    "of_sentinel": (UNITS, 6), "out": (1, UNITS),
}  # fmt: skip


def _drawn() -> tuple[Bare, dict[str, Tensor]]:
    bare = Bare(Shape(q=4, k=9, dv=6), dtype=torch.float64, rules=(Padding(TEXT),))
    bare.call = replace(bare.call, cross=True)
    draw = torch.Generator().manual_seed(1)
    return bare, {name: torch.randn(shape, generator=draw, dtype=torch.float64) / 3 for name, shape in SHAPES.items()}


def _by_hand(bare: Bare, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What heads get, and the weight beta of the sentinel."""
    out, betas = [], []
    for b in range(2):
        source = int(TEXT[b].sum())
        for h in range(4):
            for i in range(4):
                x, q = bare.hidden[b, i], bare.q[b, h, i]
                rows = slice(6 * h, 6 * h + 6)
                s = torch.sigmoid(p["gate"][rows] @ x) * torch.tanh(p["memory"][rows] @ x)
                z = [
                    (p["out"][0] * torch.tanh(p["of_key"] @ bare.k[b, h // 2, j] + p["of_query"] @ q)).sum()
                    for j in range(source)
                ]
                alpha = torch.stack(z).softmax(0)
                own = (p["out"][0] * torch.tanh(p["of_sentinel"] @ s + p["of_query"] @ q)).sum()
                beta = torch.stack([*z, own]).softmax(0)[-1]
                out.append(beta * s + (1 - beta) * (alpha @ bare.v[b, h // 2, :source]))
                betas.append(beta)
    return torch.stack(out).view(2, 4, 4, 6), torch.stack(betas).view(2, 4, 4)


def test_a_token_looks_at_the_source_or_at_what_it_knows() -> None:
    bare, p = _drawn()
    found, _ = bare.run(VisualSentinel(UNITS), "reference", params=p)
    want, betas = _by_hand(bare, p)
    assert close(found, want)
    assert float(betas.max()) > 2 * float(betas.min())
    call, method = replace(bare.call, params=p), VisualSentinel(UNITS)
    weights = method.weights(bare.q, bare.k, method.sentinel(call), call)
    assert close(weights[..., -1], betas)


def test_the_first_steps_loss_and_gradient() -> None:
    bare, p = _drawn()
    leaves = [*p.values(), bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    losses = [bare.run(VisualSentinel(UNITS), "reference", params=p)[0].pow(2).sum(), _by_hand(bare, p)[0].pow(2).sum()]
    assert close(losses[0].detach(), losses[1].detach())
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_where_nothing_may_be_seen_a_token_has_itself() -> None:
    bare, p = _drawn()
    blind = replace(bare.call, params=p, mask=replace(bare.call.mask, rules=(Padding(torch.zeros_like(TEXT)),)))
    found = VisualSentinel(UNITS).attend((bare.q, bare.k, bare.v), blind)
    assert close(found, VisualSentinel(UNITS).sentinel(blind))


def test_without_a_mask_every_key_is_seen_and_output_is_as_narrow_as_values() -> None:
    bare, p = _drawn()
    free = replace(bare.call, params=p, mask=replace(bare.call.mask, rules=()))
    given = (bare.q, bare.k, bare.v)
    whole = VisualSentinel(UNITS).attend(given, free)
    masked = VisualSentinel(UNITS).attend(given, replace(bare.call, params=p))
    assert close(whole[0], masked[0])
    assert not close(whole[1], masked[1])
    narrow = VisualSentinel(UNITS).attend(tuple(x.bfloat16() for x in given), free)  # type: ignore[arg-type]
    assert narrow.dtype == torch.bfloat16


def test_in_a_model_padding_is_no_part_of_the_source() -> None:
    model = models.tiny("bart").eval()
    ids = torch.arange(3, 19)[None]
    target = ids[:, 2:7]
    padded = torch.cat([ids, torch.full((1, 5), 1)], 1)
    mask = (torch.arange(21) < 16)[None].long()
    with attach(model, VisualSentinel(), only=("model.decoder.layers.0.encoder_attn",)) as run, torch.no_grad():
        alone = run(input_ids=ids, decoder_input_ids=target).logits
        beside = run(input_ids=padded, attention_mask=mask, decoder_input_ids=target).logits
    assert close_model(beside, alone)


def test_the_start() -> None:
    layer = Layer(3, 4, 2, 8, 6, 24)
    found = VisualSentinel(UNITS).parameters(layer)
    draw = torch.Generator().manual_seed(3)
    assert list(found) == list(SHAPES)
    for name, (rows, columns) in SHAPES.items():
        assert close(found[name], (2 * torch.rand(rows, columns, generator=draw) - 1) / math.sqrt(columns))
    assert not torch.equal(found["out"], VisualSentinel(UNITS).parameters(replace(layer, number=0))["out"])


def test_errors() -> None:
    bare, p = _drawn()
    assert VisualSentinel().idle(Bare().call)
    assert not VisualSentinel().idle(bare.call)
    assert VisualSentinel(1).units == 1
    with pytest.raises(FieldError, match=r"VisualSentinel.units = 0: must be 1 or more"):
        VisualSentinel(0)
    with pytest.raises(SiteError, match="layer 0: the block is not handed hidden states"):
        VisualSentinel().sentinel(replace(bare.call, params=p, hidden=None))
