"""FFTNet against Fourier's sums, written out."""

from __future__ import annotations

import cmath
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
from heedful.methods import FFTNet

E, HEADS = 12, 3


def _call(n: int, params: dict[str, Tensor]) -> Call:
    places = Positions.row(0, n)
    return Call(0, 1, "alone", HEADS, HEADS, places, places, 1.0, params=params)


def _drawn(n: int) -> tuple[Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    given = FFTNet(n).parameters(Layer(0, HEADS, HEADS, 4, 4, E))
    p = {name: (w.double() + torch.randn(w.shape, generator=draw) / 4).requires_grad_() for name, w in given.items()}
    return torch.randn(2, n, E, generator=draw, dtype=torch.float64).requires_grad_(), p


def _by_hand(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """One image `[n e]`, channel by channel and frequency by frequency."""
    n = len(x)
    inner = p["in"] @ (sum(x) / n) + p["in_bias"]
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    told = (p["out"] @ inner + p["out_bias"]).reshape(HEADS, n // 2 + 1)
    channels = []
    for c in range(E):
        h, waves = c // (E // HEADS), []
        for f in range(n // 2 + 1):
            z = sum(x[t, c] * cmath.exp(-2j * math.pi * f * t / n) for t in range(n)) / math.sqrt(n)
            z = z * (p["filter"][h, f] + told[h, f])
            size = (z.real**2 + z.imag**2) ** 0.5
            waves.append(z * torch.relu(size + p["bias"][h, f]) / (size + 1e-6))
        waves += [waves[n - f].conj() for f in range(n // 2 + 1, n)]
        rows = [
            sum(z * cmath.exp(2j * math.pi * f * t / n) for f, z in enumerate(waves)).real / math.sqrt(n)
            for t in range(n)
        ]
        channels.append(torch.stack(rows))
    return torch.stack(channels, 1)


@pytest.mark.parametrize("n", [7, 8])
def test_forward_loss_and_gradients(n: int) -> None:
    x, p = _drawn(n)
    found, wanted = FFTNet(n).filter(x, _call(n, p)), torch.stack([_by_hand(image, p) for image in x])
    assert close(found, wanted)
    losses = [(y - 1).pow(2).mean() for y in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, [x, *p.values()]) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_without_an_mlp_it_starts_as_the_identity() -> None:
    x, _ = _drawn(8)
    p = {name: w.double() for name, w in FFTNet(8).parameters(Layer(0, HEADS, HEADS, 4, 4, E)).items()}
    found = FFTNet(8).filter(x, _call(8, p | {"out": 0 * p["out"]}))
    assert float((found - x).detach().abs().max()) < 1e-4  # but for what keeps from dividing by zero


def test_of_few_bits_it_computes_in_more() -> None:
    x, p = _drawn(7)
    x, p = x.bfloat16(), {name: w.bfloat16() for name, w in p.items()}
    found = FFTNet(7).filter(x, _call(7, p))
    assert found.dtype is torch.bfloat16
    exact = {name: w.double() for name, w in p.items()}
    wanted = torch.stack([_by_hand(image, exact) for image in x.double()])
    assert bool(((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6).all())  # the last rounding alone


def test_the_start() -> None:
    layer = Layer(3, 8, 8, 32, 32, 256)
    p, again = FFTNet(197).parameters(layer), FFTNet(197).parameters(layer)
    shapes = {
        "filter": (8, 99), "bias": (8, 99), "in": (256, 256), "in_bias": (256,), "out": (792, 256), "out_bias": (792,),
    }  # fmt: skip
    assert {name: tuple(w.shape) for name, w in p.items()} == shapes
    assert bool((p["filter"] == 1).all())
    assert not any(bool(p[name].any()) for name in p if name.endswith("bias"))
    for name in ("in", "out"):
        bound = math.sqrt(6 / sum(p[name].shape))
        assert 0.95 * bound < float(p[name].max()) <= bound
        assert -bound <= float(p[name].min()) < -0.95 * bound
        assert torch.equal(p[name], again[name])
        assert not torch.equal(p[name], FFTNet(197).parameters(replace(layer, number=1))[name])
    assert FFTNet(6, heads=2).parameters(layer)["filter"].shape == (2, 4)


def test_the_first_step_in_a_model() -> None:
    model = models.tiny("vit")
    inputs = models.tiny_inputs(model)
    tokens = 1 + (model.config.image_size // model.config.patch_size) ** 2
    with attach(model, FFTNet(tokens)) as run:
        run(**inputs, labels=torch.zeros(len(inputs["pixel_values"]), dtype=torch.long)).loss.backward()
        grads = [p.grad for name, p in model.named_parameters() if "heedful" in name]
        assert len(grads) == 6 * model.config.num_hidden_layers
        assert all(g is not None and bool(g.any()) for g in grads)


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"FFTNet\.tokens = 0: must be 1 or more"):
        FFTNet(0)
    for heads in (0, 5):
        with pytest.raises(FieldError, match=rf"heads = {heads}: must be 1 or more and divide the 12 channels"):
            FFTNet(7, heads=heads).parameters(Layer(0, HEADS, HEADS, 4, 4, E))
    x, p = _drawn(7)
    with pytest.raises(SiteError, match=r"of 9 places, and there are 7 tokens; FFTNet\(7\) has filters for these"):
        FFTNet(9).filter(x, _call(7, p))
    with pytest.raises(SiteError, match="layer 0: frequencies are of all tokens, and there is a mask"):
        FFTNet(7).filter(x, replace(_call(7, p), mask=Mask((Causal(),))))
