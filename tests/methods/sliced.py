"""Attention with fewer maps, written out: what the tests of its kinds share."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Call, Layer, Mask, Method
from heedful.conformance.tolerances import close
from heedful.core.mask import Causal
from heedful.core.positions import Positions

N, E, HEADS = 7, 24, 4


def call(params: dict[str, Tensor]) -> Call:
    places = Positions.row(0, N)
    return Call(0, 1, "alone", HEADS, HEADS, places, places, 1.0, params=params)


def masked(params: dict[str, Tensor]) -> Call:
    return replace(call(params), mask=Mask((Causal(),)))


def written_out(x: Tensor, keys: Tensor, values: Tensor, p: dict[str, Tensor]) -> Tensor:
    """One image `[n e]`, head by head and token by token."""
    d, rows = E // HEADS, []
    for i in range(N):
        heads = []
        for h in range(HEADS):
            mine = slice(h * d, (h + 1) * d)
            q = (p["query"] @ x[i])[mine]
            weights = torch.stack([(q * keys[j, mine]).sum() / math.sqrt(d) for j in range(N)]).exp()
            heads.append(sum(w * values[j, mine] for j, w in enumerate(weights)) / weights.sum())
        rows.append(p["out"] @ torch.cat(heads))
    return torch.stack(rows)


def agrees(method: Method, by_hand: object) -> None:
    """Forward, and the first step's loss and gradients, of weights that are moved from where they start."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, N, E, generator=draw, dtype=torch.float64).requires_grad_()
    given = method.parameters(Layer(0, HEADS, HEADS, E // HEADS, E // HEADS, E))
    p = {name: (w.double() + torch.randn(w.shape, generator=draw) / 4).requires_grad_() for name, w in given.items()}
    wanted = torch.stack([by_hand(one, p) for one in x])  # type: ignore[operator]
    found = method.attend(x, call(p))  # type: ignore[attr-defined]
    assert close(found, wanted)
    losses = [(y - 1).pow(2).mean() for y in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, [x, *p.values()]) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def starts(method: Method, names: set[str]) -> None:
    layer = Layer(0, 4, 4, 64, 64, 256)
    first, again = method.parameters(layer), method.parameters(layer)
    assert set(first) == names
    for name, w in first.items():
        bound = 1 / math.sqrt(len(w))
        assert w.shape[0] == w.shape[1]
        assert torch.equal(w, again[name])
        assert not torch.equal(w, method.parameters(replace(layer, number=1))[name])
        assert 0.95 * bound < float(w.max()) <= bound
        assert -bound <= float(w.min()) < -0.95 * bound
    assert not torch.equal(first["query"], first["out"])


def weights_left(method: Method) -> float:
    """The share of attention's own weights that a method brings in their place."""
    model = models.tiny("vit")
    with attach(model, method) as run:
        brought = sum(p.numel() for name, p in run.state_dict().items() if not name.endswith("places"))
    maps = [m for name, m in model.named_modules() if "attention" in name and isinstance(m, torch.nn.Linear)]
    return brought / sum(m.weight.numel() for m in maps)
