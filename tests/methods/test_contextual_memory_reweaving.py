"""ContextualMemoryReweaving against a llama whose blocks are handed a sum over the layers before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import FieldError, Layer
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods import ContextualMemoryReweaving
from tests.by_hand import causal_map, heads_of, in_pieces, turning

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))


def _logits(model: Any, weights: dict[int, Tensor], first: int = 0) -> Tensor:
    """Where `first` is the first layer that takes part."""
    base = model.model
    x = base.embed_tokens(IDS)
    turned, d = turning(model, torch.arange(IDS.shape[1])[None]), model.config.head_dim
    handed: list[Tensor] = []
    for number, layer in enumerate(base.layers):
        y = layer.input_layernorm(x)
        handed.append(y)
        if number > first:
            for m in range(first, number):
                y = y + weights[number][m] * handed[m]
        part = layer.self_attn
        q, k, v = (p(y).unflatten(-1, (-1, d)).transpose(1, 2) for p in (part.q_proj, part.k_proj, part.v_proj))
        heads = heads_of(causal_map(turned(q), turned(k)), v)
        x = x + part.o_proj(heads.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    out: Tensor = model.lm_head(base.norm(x))
    return out


def test_the_first_steps_loss_and_gradient() -> None:
    model = models.tiny("llama", num_hidden_layers=4)
    with attach(model, ContextualMemoryReweaving()) as run:
        with torch.no_grad():
            for p in run.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
        mine = {len(p): p.detach().clone().requires_grad_() for p in run.parameters()}
        assert sorted(mine) == [1, 2, 3]
        logits = _logits(model, mine)
        assert close_model(run(IDS).logits, logits)
        want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        found = run(IDS, labels=IDS, use_cache=False).loss
        found.backward()
        assert close_model(found.detach(), want.detach())
        for p, slope in zip(run.parameters(), torch.autograd.grad(want, list(mine.values())), strict=True):
            assert bool(slope.all())
            assert close_model(p.grad, slope)


def test_some_layers_alone_and_step_by_step() -> None:
    model = models.tiny("llama", num_hidden_layers=4).eval()
    with attach(model, ContextualMemoryReweaving(0.5).on(layers=[1, 2, 3])) as run, torch.no_grad():
        whole = run(IDS).logits
        assert close_model(whole, _logits(model, dict.fromkeys(range(4), torch.full((4,), 0.5)), first=1))
        assert close_model(in_pieces(run, IDS, (4, 1, 4))[0], whole)


def test_a_decoder_is_told_nothing_of_its_encoder() -> None:
    """Layers 0 and 1 stand in another list, and may be of another length."""
    draw, state = torch.Generator().manual_seed(1), State()
    own = [torch.randn(2, 5, 8, generator=draw) for _ in range(3)]
    state.forward.update({"0": torch.randn(2, 9, 8, generator=draw), "1": torch.randn(2, 9, 8, generator=draw)})
    weight = torch.tensor([5.0, 6.0, 0.5, -2.0])
    places = Positions.row(0, 5)
    for layer, want in ((2, own[0]), (3, own[1] + 0.5 * own[0]), (4, own[2] + 0.5 * own[0] - 2 * own[1])):
        call = Call(layer, 5, "x", 1, 1, places, places, 1.0, lowest=2, params={"weight": weight}, state=state)
        assert close(ContextualMemoryReweaving().weave(own[layer - 2], call), want)


def test_the_start() -> None:
    assert ContextualMemoryReweaving(0.25).parameters(Layer(3, 4, 2, 8, 8, 32))["weight"].tolist() == [0.25] * 3
    assert ContextualMemoryReweaving().parameters(Layer(1, 4, 2, 8, 8, 32))["weight"].tolist() == [0.0]
    assert ContextualMemoryReweaving().parameters(Layer(0, 4, 2, 8, 8, 32)) == {}


def test_errors() -> None:
    for start in (-1.1, 1.1):
        with pytest.raises(FieldError, match=r"ContextualMemoryReweaving.start = .*: must lie from -1 to 1"):
            ContextualMemoryReweaving(start)
