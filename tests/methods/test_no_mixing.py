"""NoMixing against the paper's gated feed-forward part, number by number."""

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
from heedful.methods import NoMixing

Matrix = list[list[float]]


def times(rows: Matrix, x: list[float]) -> list[float]:
    return [sum(w * a for w, a in zip(row, x, strict=True)) for row in rows]


def by_hand(x: list[float], gate: Matrix, up: Matrix, down: Matrix) -> list[float]:
    inner = [g / (1 + math.exp(-g)) * u for g, u in zip(times(gate, x), times(up, x), strict=True)]
    return times(down, inner)


def test_each_token_goes_through_the_net_alone() -> None:
    bare = Bare(dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    shapes = {"gate": (5, 24), "up": (5, 24), "down": (24, 5)}
    own = {name: torch.randn(shape, generator=draw).double() for name, shape in shapes.items()}
    found = NoMixing().alone(bare.hidden, replace(bare.call, params=own))
    wanted = [[by_hand(x.tolist(), *(w.tolist() for w in own.values())) for x in text] for text in bare.hidden]
    assert close(found, torch.tensor(wanted, dtype=torch.float64))


def test_it_has_as_many_parameters_as_the_projections() -> None:
    layer = Layer(3, 4, 2, 8, 6, 28)  # (4 + 2) (8 + 6) 28 weights in four projections
    found = NoMixing().parameters(layer)
    assert {name: tuple(x.shape) for name, x in found.items()} == {"gate": (28, 28), "up": (28, 28), "down": (28, 28)}
    assert sum(x.numel() for x in found.values()) == 6 * 14 * 28
    assert NoMixing(0.5).parameters(layer)["down"].shape == (28, 14)
    assert NoMixing(0.001).parameters(layer)["down"].shape == (28, 1)
    draw = torch.Generator().manual_seed(3)
    wide = replace(layer, width=10)
    for name, shape in {"gate": (28, 10), "up": (28, 10), "down": (10, 28)}.items():
        wanted = (2 * torch.rand(shape, generator=draw) - 1) / math.sqrt(shape[1])
        assert close(NoMixing().parameters(wide)[name], wanted)


def test_the_first_step_s_loss_and_gradient() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with attach(model, NoMixing().on(layers=1)) as run:
        mixed = run(input_ids=ids, use_cache=False).logits
    with attach(model, NoMixing()) as run:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        learned = {name: p for name, p in run.model.named_parameters() if name.endswith(("gate", "up", "down"))}
        found = {name: p.grad for name, p in learned.items()}
    mine = {name: p.detach().clone().requires_grad_() for name, p in learned.items()}
    assert len(mine) == 6
    base = model.model
    x = base.embed_tokens(ids)
    for i, layer in enumerate(base.layers):
        gate, up, down = (p for name, p in mine.items() if f"layers.{i}." in name)
        y = layer.input_layernorm(x)
        inner = y @ gate.T
        x = x + (inner / (1 + torch.exp(-inner)) * (y @ up.T)) @ down.T
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: Tensor = model.lm_head(base.norm(x))
    assert not close(mixed, logits)
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert close(loss, wanted)
    wanted.backward()
    for name, tensor in mine.items():
        assert tensor.grad is not None
        assert found[name] is not None
        assert bool(tensor.grad.any())
        assert close(found[name], tensor.grad)  # type: ignore[arg-type]


def test_errors() -> None:
    for share in (0.0, math.inf):
        with pytest.raises(FieldError, match=r"share = .*: must be above 0"):
            NoMixing(share)
