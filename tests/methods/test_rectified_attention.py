"""ReLA against a reading of the paper's formulas in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.methods import RectifiedAttention

SIZE = Layer(3, 4, 2, 8, 6, 32)


def by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float, gain: Tensor, gate: Tensor, eps: float) -> Tensor:
    """One text: every token looks at itself and those before; o_t = scale * o / rms(o) * sigmoid(gate * o)."""
    h, n, d = q.shape
    out = torch.zeros(h, n, v.shape[-1], dtype=q.dtype)
    for t in range(n):
        heads = []
        for head in range(h):
            group = head * k.shape[0] // h
            seen = torch.zeros(v.shape[-1], dtype=q.dtype)
            for j in range(t + 1):
                score = sum(q[head, t, i] * k[group, j, i] for i in range(d)) * scale
                if score > 0:
                    seen = seen + score * v[group, j]
            heads.append(seen)
        o = torch.cat(heads)
        rms = math.sqrt(sum(float(x) ** 2 for x in o) / len(o) + eps)
        for i, x in enumerate(o):
            head, place = divmod(i, v.shape[-1])
            out[head, t, place] = gain[i] * x / rms / (1 + math.exp(-float(gate[i] * x)))
    return out


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("eps", [1e-8, 0.3])
def test_the_formula_in_every_backend(backend: str, eps: float) -> None:
    bare, method = Bare(), RectifiedAttention(eps)
    size = Layer(0, bare.q.shape[1], bare.k.shape[1], bare.q.shape[-1], bare.v.shape[-1], 32)
    drawn = torch.Generator().manual_seed(1)
    params = {name: torch.randn(x.shape, generator=drawn) for name, x in method.parameters(size).items()}
    heads, _ = bare.run(method, backend, params=params, tile_rows=7 if backend == "tiled" else None)
    for text in range(len(bare.q)):
        q, k, v = (x[text].double() for x in (bare.q, bare.k, bare.v))
        wanted = by_hand(q, k, v, bare.call.scale, params["scale"].double(), params["gate"].double(), eps)
        assert close(heads[text], wanted.float())


def test_it_starts_with_a_plain_norm_and_the_authors_gate() -> None:
    found = RectifiedAttention().parameters(SIZE)
    assert found["scale"].tolist() == [1.0] * 24
    bound = math.sqrt(3 / 24)
    assert 0.7 * bound < float(found["gate"].abs().max()) < bound
    assert float(found["gate"].min()) < 0 < float(found["gate"].max())
    assert torch.equal(found["gate"], RectifiedAttention().parameters(SIZE)["gate"])
    other = RectifiedAttention().parameters(Layer(4, 4, 2, 8, 6, 32))
    assert not torch.equal(found["gate"], other["gate"])


def test_a_token_that_looks_at_nothing_gets_zeros_and_finite_gradients() -> None:
    bare, method = Bare(), RectifiedAttention()
    q = bare.q.clone()
    q[:, :, 5] = 0.0  # every score of this token is zero
    bare.q = q.requires_grad_()
    size = Layer(0, bare.q.shape[1], bare.k.shape[1], bare.q.shape[-1], bare.v.shape[-1], 32)
    heads, _ = bare.run(method, "reference", params=method.parameters(size))
    assert not bool(heads[:, :, 5].any())
    heads.square().sum().backward()
    assert bare.q.grad is not None
    assert bool(bare.q.grad.isfinite().all())


def test_scale_and_gate_are_trained() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, RectifiedAttention()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert len(run.parameters()) == 4
        assert all(p.grad is not None and bool(p.grad.any()) for p in run.parameters())


def test_settings_are_checked() -> None:
    with pytest.raises(FieldError, match=r"eps = 0.0: must be above 0"):
        RectifiedAttention(0)
