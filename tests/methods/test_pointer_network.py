"""Pointer networks: scores by a net of one layer, pair by pair, and a pattern that is the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import FieldError, Layer
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.errors import ClashError
from heedful.methods import MultiTokenAttention, PointerNetwork
from heedful.nn import Attention

UNITS = 5


def drawn() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = {"of_query": (UNITS, 8), "of_key": (UNITS, 8), "out": (1, UNITS)}
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) / 2 for name, shape in shapes.items()}


def energy(q: Tensor, k: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """u_ij, unit by unit."""
    found = torch.zeros((), dtype=q.dtype)
    for w1, w2, v in zip(p["of_key"], p["of_query"], p["out"][0], strict=True):
        found = found + v * torch.tanh((w1 * k).sum() + (w2 * q).sum())
    return found


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_values_are_mixed_by_what_the_net_points_at(backend: str) -> None:
    text = torch.ones(2, 19, dtype=torch.bool)
    text[0, :4] = False
    bare, p = Bare(text=text, dtype=torch.float64), drawn()
    found, _ = bare.run(PointerNetwork(UNITS), backend, params=p, tile_rows=7 if backend == "tiled" else None)
    for b, h, i in [(0, 0, 3), (0, 1, 4), (0, 3, 18), (1, 2, 0), (1, 0, 9), (1, 3, 18)]:
        seen = [j for j in range(i + 1) if text[b, j]]
        if not seen:
            assert not bool(found[b, h, i].any())
            continue
        weights = torch.stack([energy(bare.q[b, h, i], bare.k[b, h // 2, j], p) for j in seen]).softmax(0)
        assert close(found[b, h, i], weights @ bare.v[b, h // 2, seen])


def test_a_bias_of_the_model_stays() -> None:
    bare, p = Bare(dtype=torch.float64), drawn()
    bias = torch.randn(2, 4, 19, 19, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    call = replace(bare.call, query=bare.q, key=bare.k, bias=bias, params=p).tile(slice(5, 9), slice(2, 11))
    found = PointerNetwork(UNITS).point(torch.randn(2, 4, 4, 9), call)
    assert found.dtype == torch.float32
    for b, h, i, j in [(0, 0, 0, 0), (1, 3, 3, 8), (0, 2, 1, 7)]:
        want = energy(bare.q[b, h, i + 5], bare.k[b, h // 2, j + 2], p).float() + bias[b, h, i + 5, j + 2].float()
        assert close(found[b, h, i, j], want)


def test_the_pattern_is_an_answer_that_can_be_trained() -> None:
    """The first step's loss and gradient of a net that is told the right places."""
    torch.manual_seed(0)
    pointer = Attention(6, 1, PointerNetwork(UNITS), batch_first=True).double()
    with torch.no_grad():
        for p in pointer.parameters():
            p.copy_(torch.randn_like(p))
    state, read = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 7, 6, dtype=torch.float64)
    places = torch.tensor([[0, 6, 3], [2, 2, 5]])
    _, weights = pointer(state, read, read, need_weights=True)
    loss = -weights.gather(-1, places[..., None]).log().sum()
    p = {name: pointer.get_parameter(full) for name in ("of_query", "of_key", "out")
         for full, _ in pointer.named_parameters() if full.endswith(name)}  # fmt: skip
    assert len(p) == 3
    want = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for i in range(3):
            q, keys = pointer.q_proj(state[b, i]), [pointer.k_proj(x) for x in read[b]]
            energies = [energy(q, k, p) for k in keys]
            total = sum(torch.exp(e) for e in energies)
            want = want - torch.log(torch.exp(energies[int(places[b, i])]) / total)
    assert close(loss.detach(), want.detach())
    learned = [*p.values(), pointer.q_proj.weight, pointer.k_proj.weight]
    for one, other in zip(torch.autograd.grad(loss, learned), torch.autograd.grad(want, learned), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_the_start() -> None:
    layer = Layer(3, 4, 2, 8, 6, 32)
    found = PointerNetwork(9).parameters(layer)
    draw = torch.Generator().manual_seed(3)
    for name, (rows, columns) in {"of_query": (9, 8), "of_key": (9, 8), "out": (1, 9)}.items():
        assert close(found[name], (2 * torch.rand(rows, columns, generator=draw) - 1) / math.sqrt(columns))
    assert not torch.equal(found["out"], PointerNetwork(9).parameters(replace(layer, number=0))["out"])


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"PointerNetwork.units = 0: must be 1 or more"):
        PointerNetwork(0)
    assert PointerNetwork(1).units == 1
    with pytest.raises(ClashError, match="it looks at rows of earlier calls"):
        PointerNetwork() | MultiTokenAttention()
