"""Local attention with predicted places, against its formulas token by token."""

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
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Padding
from heedful.methods import LocalP

TEXT = torch.ones(2, 13, dtype=torch.bool)
TEXT[1, 8:] = False
LAYER = "model.decoder.layers.0.encoder_attn"


def _drawn(q: int = 6, k: int = 13) -> tuple[Bare, dict[str, Tensor]]:
    bare, draw = Bare(Shape(q=q, k=k), dtype=torch.float64, rules=(Padding(TEXT),)), torch.Generator().manual_seed(1)
    bare.call = replace(bare.call, cross=True)
    params = {
        "turn": torch.randn(4 * 8, 24, generator=draw, dtype=torch.float64) / 3,
        "place": torch.randn(4, 8, generator=draw, dtype=torch.float64),
    }
    return bare, params


def _head(x: Tensor, q: Tensor, k: Tensor, v: Tensor, turn: Tensor, place: Tensor, window: int) -> Tensor:
    """What one token's head gets of a source without padding, of which there is nothing but `k` and `v`."""
    source = len(k)
    centre = source * torch.sigmoid(place @ torch.tanh(turn @ x))
    near = [s for s in range(source) if centre - window <= s <= centre + window]
    if not near:
        return torch.zeros_like(v[0])
    align = torch.stack([q @ k[s] for s in near]).div(math.sqrt(len(q))).softmax(0)
    sigma = window / 2
    return sum(a * torch.exp(-((s - centre) ** 2) / (2 * sigma**2)) * v[s] for a, s in zip(align, near, strict=True))


def _by_hand(bare: Bare, p: dict[str, Tensor], window: int) -> Tensor:
    out = torch.zeros_like(bare.q)
    for b in range(2):
        source = int(TEXT[b].sum())
        k, v = bare.k[b, :, :source], bare.v[b, :, :source]
        for h in range(4):
            for i in range(bare.shape.q):
                turn = p["turn"][8 * h : 8 * h + 8]
                x = bare.hidden[b, i]
                out[b, h, i] = _head(x, bare.q[b, h, i], k[h // 2], v[h // 2], turn, p["place"][h], window)
    return out


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("window", [1, 3])
def test_a_token_sees_what_is_near_the_place_it_predicts(window: int, backend: str) -> None:
    bare, params = _drawn()
    found, _ = bare.run(LocalP(window), backend, 2 if backend == "tiled" else None, params)
    wanted = _by_hand(bare, params, window)
    assert close(found, wanted)
    assert bool(wanted.any(-1).all()), "every token sees some place"


def test_both_ends_of_the_window_are_seen() -> None:
    """Where the place is the middle of a source of 8, two whole numbers of places away."""
    bare, params = _drawn()
    params["place"] = params["place"] * 0
    assert close(bare.run(LocalP(2), "reference", params=params)[0], _by_hand(bare, params, 2))


def test_the_first_steps_loss_and_gradient() -> None:
    bare, params = _drawn()
    leaves = [*params.values(), bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    losses = [x.pow(2).sum() for x in (bare.run(LocalP(3), "tiled", 2, params)[0], _by_hand(bare, params, 3))]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_a_wide_window_with_an_even_bell_is_global_attention() -> None:
    bare, params = _drawn()
    plain = (bare.q @ bare.k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~TEXT[:, None, None], -torch.inf)
    found, _ = bare.run(LocalP(10**9), "reference", params=params)
    assert close(found, plain.softmax(-1) @ bare.v.repeat_interleave(2, 1))


def test_rows_of_earlier_calls_that_an_edit_beside_it_looks_at_are_not_its_own() -> None:
    bare, params = _drawn()
    call, weights = replace(bare.call, params=params, key=bare.k), torch.rand(2, 4, 4, 13, dtype=torch.float64)
    found = LocalP(3).favour(weights, replace(call.tile(slice(1, 5), slice(0, 13)), earlier=2, rows=slice(3, 7)))
    assert close(found, LocalP(3).favour(weights, call.tile(slice(1, 5), slice(0, 13))))


def test_in_a_model_padding_is_no_part_of_the_source() -> None:
    model = models.tiny("bart").eval()
    ids = torch.arange(3, 19)[None]
    target = ids[:, 2:7]
    padded = torch.cat([ids, torch.full((1, 5), 1)], 1)
    mask = (torch.arange(21) < 16)[None].long()
    with attach(model, LocalP(3), only=(LAYER,)) as run, torch.no_grad():
        alone = run(input_ids=ids, decoder_input_ids=target).logits
        beside = run(input_ids=padded, attention_mask=mask, decoder_input_ids=target).logits
    assert close_model(beside, alone)


def test_the_start() -> None:
    layer = Layer(2, 4, 2, 8, 8, 25)
    found, again = LocalP().parameters(layer), LocalP().parameters(layer)
    assert {name: tuple(x.shape) for name, x in found.items()} == {"turn": (32, 25), "place": (4, 8)}
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not torch.equal(found["turn"], LocalP().parameters(replace(layer, number=0))["turn"])
    for name, bound in (("turn", 1 / 5), ("place", 1 / math.sqrt(8))):
        assert 0.9 * bound < float(found[name].max()) <= bound
        assert -bound <= float(found[name].min()) < -0.9 * bound


def test_errors() -> None:
    bare, params = _drawn()
    assert LocalP().idle(Bare().call)
    assert not LocalP().idle(bare.call)
    with pytest.raises(FieldError, match=r"LocalP.window = 0: must be 1 or more"):
        LocalP(0)
    for lost in ({"hidden": None, "key": bare.k}, {"key": None}):
        with pytest.raises(SiteError, match="LocalP, layer 0: the block is not handed hidden states"):
            LocalP().centres(replace(bare.call, params=params, **lost))  # type: ignore[arg-type]
