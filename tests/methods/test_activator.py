"""Activator against the authors' gating unit, number by number."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from heedful import attach, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.methods import Activator

E, INNER = 24, 10


def drawn() -> dict[str, Tensor]:
    shapes = {
        "gate": (INNER, E), "gate_bias": (INNER,), "up": (INNER, E), "up_bias": (INNER,), "down": (E, INNER),
        "down_bias": (E,), "norm": (INNER,), "norm_bias": (INNER,),
    }  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=draw).double().requires_grad_() for name, shape in shapes.items()}


def normed(x: list[Tensor], p: dict[str, Tensor]) -> list[Tensor]:
    mean = sum(x) / len(x)
    deviation = (sum((a - mean) ** 2 for a in x) / len(x) + 1e-5) ** 0.5
    return [(a - mean) / deviation * w + b for a, w, b in zip(x, p["norm"], p["norm_bias"], strict=True)]


def by_hand(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """One token."""
    gate = [(row * x).sum() + b for row, b in zip(p["gate"], p["gate_bias"], strict=True)]
    gate = normed([a * (1 + torch.erf(a / math.sqrt(2))) / 2 for a in gate], p)
    up = normed([(row * x).sum() + b for row, b in zip(p["up"], p["up_bias"], strict=True)], p)
    inner = torch.stack([a * b for a, b in zip(gate, up, strict=True)])
    return torch.stack([(row * inner).sum() + b for row, b in zip(p["down"], p["down_bias"], strict=True)])


def test_each_token_goes_through_the_gate_alone() -> None:
    bare, p = Bare(dtype=torch.float64), drawn()
    x = bare.hidden[:, :4].clone().requires_grad_()
    found = Activator().gate(x, replace(bare.call, params=p))
    wanted = torch.stack([torch.stack([by_hand(token, p) for token in text]) for text in x])
    assert close(found, wanted)
    losses = [(y - 1).pow(2).mean() for y in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, [x, *p.values()]) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_what_it_starts_with() -> None:
    layer = Layer(3, 4, 4, 64, 64, 256)
    p = Activator().parameters(layer)
    torch.manual_seed(0)
    theirs = {"gate": nn.Linear(256, 512), "up": nn.Linear(256, 512), "down": nn.Linear(512, 256)}
    for name, linear in theirs.items():
        for mine, their in ((p[name], linear.weight), (p[f"{name}_bias"], linear.bias)):
            assert mine.shape == their.shape
            bound = 1 / math.sqrt(linear.in_features)
            assert 0.95 * bound < float(mine.max()) <= bound
            assert -bound <= float(mine.min()) < -0.95 * bound
    assert p["norm"].tolist() == [1.0] * 512
    assert p["norm_bias"].tolist() == [0.0] * 512
    assert torch.equal(p["up"], Activator().parameters(layer)["up"])
    assert not torch.equal(p["up"], p["gate"])
    assert not torch.equal(p["up"], Activator().parameters(replace(layer, number=4))["up"])
    assert Activator(0.5).parameters(layer)["down"].shape == (256, 128)
    assert Activator(0.001).parameters(layer)["down"].shape == (256, 1)


def test_the_first_step_in_a_model() -> None:
    model = models.tiny("vit")
    inputs = models.tiny_inputs(model)
    labels = torch.arange(len(inputs["pixel_values"]))
    with attach(model, Activator().on(layers=0)) as run:
        loss = run(**inputs, labels=labels).loss
        loss.backward()
        grads = {name.rpartition("_heedful")[2]: p.grad for name, p in model.named_parameters() if "heedful" in name}
        assert len(grads) == 8
        assert all(g is not None and bool(g.any()) for g in grads.values())
    with attach(model, Activator()) as run, torch.no_grad():  # then a class token learns nothing of the image
        one, other = run(**inputs).logits, run(**{k: 2 * v for k, v in inputs.items()}).logits
        assert close_model(one, other)
        assert close_model(one[0], one[1])


def test_errors() -> None:
    for inner in (0.0, -1.0, math.inf):
        with pytest.raises(FieldError, match=r"Activator\.inner = .*: must be above 0"):
            Activator(inner)
