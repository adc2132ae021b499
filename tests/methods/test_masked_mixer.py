"""MaskedMixer against a masked convolution over tokens, token by token."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Call, Causal, Layer, Mask
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, SiteError
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods import MaskedMixer
from tests.by_hand import in_pieces

N, E, PLACES = 9, 6, 11


def _by_hand(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """One text `[n e]` without padding."""
    rows = []
    for i in range(len(x)):
        row = p["bias"][i] * torch.ones_like(x[i])
        for j in range(i + 1):
            row = row + p["places"][i, j] * x[j]
        rows.append(row)
    return torch.stack(rows)


def _drawn() -> tuple[Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    shapes = {"places": (PLACES, PLACES), "bias": (PLACES,)}
    p = {name: torch.randn(shape, generator=draw).double().requires_grad_() for name, shape in shapes.items()}
    return torch.randn(2, N, E, generator=draw, dtype=torch.float64).requires_grad_(), p


def _call(p: dict[str, Tensor], first: int = 0, n: int = N, text: Tensor | None = None) -> Call:
    filled = None if text is None else text[:, None, first : first + n]
    pad = None if text is None else text.long().cummax(-1).values.logical_not().sum(-1)
    queries, keys = Positions.row(first, n, pad=pad, is_filled=filled), Positions.row(0, first + n, pad=pad)
    return Call(0, 1, "alone", 2, 2, queries, keys, 1.0, mask=Mask((Causal(),)), params=p)


def test_forward_loss_and_gradients() -> None:
    x, p = _drawn()
    found, wanted = MaskedMixer(PLACES).mix(x, _call(p)), torch.stack([_by_hand(row, p) for row in x])
    assert close(found, wanted)
    losses = [(y - 1).pow(2).mean() for y in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, [x, *p.values()]) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_it_is_the_authors_convolution() -> None:
    x, p = _drawn()
    conv = nn.Conv1d(N, N, 1).double()
    with torch.no_grad():
        conv.weight.copy_(p["places"][:N, :N].tril()[..., None])
        conv.bias.copy_(p["bias"][:N])  # type: ignore[union-attr]
    assert close(MaskedMixer(PLACES).mix(x, _call(p)), conv(x))


def test_call_by_call_and_padded() -> None:
    x, p = _drawn()
    text = torch.ones(2, N, dtype=torch.bool)
    text[0, :4] = False
    state, found = State(), []
    for first, stop in itertools.pairwise((0, 5, 6, 9)):
        call = replace(_call(p, first, stop - first, text), state=state)
        found.append(MaskedMixer(PLACES).mix(x[:, first:stop], call))
    whole = torch.cat(found, 1)
    assert close(whole[0, 4:], _by_hand(x[0, 4:], p))
    assert close(whole[1], _by_hand(x[1], p))
    assert state.cache["tokens"].shape == (2, N, E)


def test_padding_behind_a_text_counts_for_nothing() -> None:
    x, p = _drawn()
    text = torch.ones(2, N, dtype=torch.bool)
    text[0, 5:] = False
    found = MaskedMixer(PLACES).mix(x, _call(p, text=text))
    assert close(found[0, :5], _by_hand(x[0, :5], p))
    assert close(found[0, 5:], p["bias"][0].expand(4, E))  # what padding gets is nobody's
    assert close(found[1], _by_hand(x[1], p))


def test_in_a_model_step_by_step_and_after_a_crop() -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=16)["input_ids"]
    with attach(model, MaskedMixer(16)) as run, torch.no_grad():
        whole = run(input_ids=ids).logits
        parts, cache = in_pieces(run, ids, (9, 1, 6))
        assert close_model(parts, whole)
        cache.crop(-4)
        again = run(input_ids=ids[:, 12:], use_cache=True, **{CACHE: cache}).logits
        assert close_model(again, whole[:, 12:])
        with pytest.raises(SiteError, match=r"layer 0: has weights of 16 places, and a text is longer; train it with"):
            run(input_ids=torch.cat([ids, ids[:, :1]], 1))


def test_the_start() -> None:
    layer = Layer(3, 4, 4, 8, 8, 32)
    p, again = MaskedMixer(400).parameters(layer), MaskedMixer(400).parameters(layer)
    assert {name: tuple(x.shape) for name, x in p.items()} == {"places": (400, 400), "bias": (400,)}
    for name, x in p.items():
        assert torch.equal(x, again[name])
        assert not torch.equal(x, MaskedMixer(400).parameters(replace(layer, number=1))[name])
        assert 0.95 / 20 < float(x.max()) <= 1 / 20
        assert -1 / 20 <= float(x.min()) < -0.95 / 20
    assert MaskedMixer().parameters(layer)["bias"].shape == (512,)
    assert 0.099 < float(MaskedMixer(100).parameters(layer)["places"].abs().max()) <= 0.1


def test_errors() -> None:
    x, p = _drawn()
    with pytest.raises(FieldError, match=r"MaskedMixer\.tokens = 0: must be 1 or more"):
        MaskedMixer(0)
    with pytest.raises(SiteError, match="layer 0: mixes what came before; restrict it to causal layers"):
        MaskedMixer(PLACES).mix(x, replace(_call(p), mask=Mask()))
    model, row = models.tiny("llama"), torch.arange(3, 11)[None]
    with attach(model, MaskedMixer(PLACES)) as run:
        run(input_ids=row)
        with pytest.raises(SiteError, match="takes a row for one text, and several are packed into one row"):
            run(input_ids=row, position_ids=torch.arange(8)[None] % 4, use_cache=False)
    with pytest.raises(SiteError, match="layer 0: a mixer goes on from token 3, and holds 0 of those before"):
        MaskedMixer(PLACES).mix(x[:, :2], replace(_call(p, 3, 2), state=State()))
    with pytest.raises(SiteError, match="has weights of 8 places"):
        MaskedMixer(8).mix(x, _call(p))
    MaskedMixer(9).mix(x, _call({"places": p["places"][:9, :9], "bias": p["bias"][:9]}))
