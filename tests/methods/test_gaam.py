"""GAAM against the authors' product of Gaussians, number by number."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Call, Causal, Layer, Mask
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, SiteError
from heedful.core.positions import Positions
from heedful.methods import GAAM

N, E, HEADS, GAUSSIANS = 8, 5, 3, 2


def _call(params: dict[str, Tensor], n: int = N) -> Call:
    places = Positions.row(0, n)
    return Call(0, 1, "alone", 1, 1, places, places, 1.0, params=params)


def _drawn() -> tuple[Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    p = {
        "offset": torch.randn(HEADS, GAUSSIANS, generator=draw, dtype=torch.float64),
        "spread": 0.5 + torch.rand(HEADS, GAUSSIANS, generator=draw, dtype=torch.float64),
    }
    x = torch.randn(2, N, E, generator=draw, dtype=torch.float64)
    return x.requires_grad_(), {name: w.requires_grad_() for name, w in p.items()}


def _by_hand(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """One image `[n e]`; heads have 2, 2 and 4 of its 8 tokens."""
    out = []
    for h, tokens in enumerate((range(2), range(2, 4), range(4, 8))):
        columns = []
        for c in range(E):
            mine = [x[t, c] for t in tokens]
            mean = sum(mine) / len(mine)
            variance = sum((a - mean) ** 2 for a in mine) / (len(mine) - 1) + 1e-8
            found = []
            for a in mine:
                product = torch.ones((), dtype=x.dtype)
                for u, s in zip(p["offset"][h], p["spread"][h], strict=True):
                    z = (a - (mean + u)) / variance**0.5
                    product = product * torch.exp(-(z**2) / (2 * s**2)) / (2 * math.pi * s**2) ** 0.5
                found.append(product)
            columns.append(torch.stack([a * w / sum(found) for a, w in zip(mine, found, strict=True)]))
        out.append(torch.stack(columns, 1))
    return torch.cat(out)


def test_forward_loss_and_gradients() -> None:
    x, p = _drawn()
    found, wanted = GAAM(HEADS, GAUSSIANS).weigh(x, _call(p)), torch.stack([_by_hand(image, p) for image in x])
    assert close(found, wanted)
    losses = [(y - 1).pow(2).mean() for y in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, [x, *p.values()]) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_a_channel_that_never_changes_is_weighed_evenly() -> None:
    x = torch.full((1, 4, 1), 3.0, dtype=torch.float64)
    p = {"offset": torch.zeros(1, 1).double(), "spread": torch.ones(1, 1).double()}
    assert close(GAAM(1, 1).weigh(x, _call(p, 4)), x / 4)


def test_the_start() -> None:
    layer = Layer(3, 4, 4, 8, 8, 32)
    p, random = GAAM().parameters(layer), torch.Generator().manual_seed(3)
    assert p["offset"].tolist() == [[0.0] * 5] * 4
    assert close(p["spread"], torch.randn(4, 5, generator=random).exp())
    assert {name: tuple(w.shape) for name, w in GAAM(2, 3).parameters(layer).items()} == {
        "offset": (2, 3),
        "spread": (2, 3),
    }


def test_the_first_step_in_a_model() -> None:
    model = models.tiny("vit")
    inputs = models.tiny_inputs(model)
    with attach(model, GAAM(2)) as run:
        run(**inputs, labels=torch.zeros(len(inputs["pixel_values"]), dtype=torch.long)).loss.backward()
        grads = [p.grad for name, p in model.named_parameters() if "heedful" in name]
        assert len(grads) == 2 * model.config.num_hidden_layers
        assert all(g is not None and bool(g.any()) for g in grads[:2])


def test_errors() -> None:
    for settings in ({"heads": 0}, {"gaussians": 0}):
        with pytest.raises(FieldError, match=r"GAAM\..* = 0: must be 1 or more"):
            GAAM(**settings)
    x, p = _drawn()
    with pytest.raises(SiteError, match="layer 0: 5 heads need two tokens each, and there are 8; take fewer"):
        GAAM(5).weigh(x, _call(p))
    with pytest.raises(SiteError, match="layer 0: means and variances are of all tokens, and there is a mask"):
        GAAM(HEADS, GAUSSIANS).weigh(x, replace(_call(p), mask=Mask((Causal(),))))
