"""ContinuumAttention against integrals by quadrature, sample by sample."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import FieldError, SiteError
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.methods import ContinuumAttention

WEIGHTS = tuple(0.3 + (7 * i % 5) for i in range(19))
TEXT = torch.ones(2, 19, dtype=torch.bool)
TEXT[0, :4] = False
IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))


def _integral(q: Tensor, k: Tensor, v: Tensor, weights: tuple[float, ...]) -> Tensor:
    """The mean of the values under the density exp(q k), by a quadrature of these samples."""
    density = [w * math.exp(float(q @ key) / math.sqrt(len(q))) for w, key in zip(weights, k, strict=True)]
    return sum(p * value for p, value in zip(density, v, strict=True)) / sum(density)


@pytest.mark.parametrize(("backend", "rows"), [("reference", None), ("tiled", 5)])
@pytest.mark.parametrize("padded", [False, True])
def test_samples_count_by_their_weights(backend: str, rows: int | None, padded: bool) -> None:
    bare = Bare(dtype=torch.float64, text=TEXT if padded else None)
    found, _ = bare.run(ContinuumAttention(WEIGHTS), backend, rows)
    for b in range(2):
        first = 4 if padded and b == 0 else 0
        for h in range(4):
            for i in range(first, 19):
                k, v = (x[b, h // 2, first : i + 1] for x in (bare.k, bare.v))
                assert close(found[b, h, i], _integral(bare.q[b, h, i], k, v, WEIGHTS[: i + 1 - first]))


def test_a_sample_of_twice_the_weight_is_two_samples() -> None:
    bare = Bare(dtype=torch.float64, rules=())
    found, _ = bare.run(ContinuumAttention((1.0,) * 7 + (2.0,) + (1.0,) * 11), "reference")
    k, v = (torch.cat([x[:, :, :7], x[:, :, 7:8], x[:, :, 7:]], 2).repeat_interleave(2, 1) for x in (bare.k, bare.v))
    assert close(found, (bare.q @ k.mT / 8**0.5).softmax(-1) @ v)


def test_weights_by_the_trapezoidal_rule() -> None:
    places = (0.0, 0.5, 0.75, 2.0)
    weights = ContinuumAttention.of(places).weights
    assert weights == (0.25, 0.375, 0.75, 0.625)
    values = (3.0, -1.0, 2.0, 5.0)
    line = sum((b - a) * (x + y) / 2 for a, b, x, y in zip(places, places[1:], values, values[1:], strict=False))
    assert sum(w * x for w, x in zip(weights, values, strict=True)) == line
    assert ContinuumAttention.of([2, 5]).weights == (1.5, 1.5)


def test_on_a_line_it_is_the_authors_attention() -> None:
    """exp(s) over its integral, and its integral with the values, both by the trapezoidal rule; from their code."""
    bare = Bare(dtype=torch.float64, rules=())
    places = [0.1 * i**1.5 for i in range(19)]
    found, _ = bare.run(ContinuumAttention.of(places), "reference")
    apart = torch.tensor(places, dtype=torch.float64).diff()
    for b, h in product(range(2), range(4)):
        k, v = bare.k[b, h // 2], bare.v[b, h // 2]
        for i in range(19):
            scores = k @ bare.q[b, h, i] / math.sqrt(8)
            density = (scores - scores.max()).exp()
            density = density / (0.5 * apart * (density[1:] + density[:-1])).sum()
            moment = density[:, None] * v
            assert close(found[b, h, i], (0.5 * apart[:, None] * (moment[1:] + moment[:-1])).sum(0))


def test_only_ratios_count() -> None:
    model = models.tiny("llama")
    found = []
    for factor in (1.0, 40.0):
        with attach(model, ContinuumAttention(tuple(factor * w for w in WEIGHTS))) as run:
            found.append(run(IDS).logits)
    assert close_model(found[0], found[1])
    assert not close_model(found[0], model(IDS).logits)


def test_equal_weights_change_no_bit() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    plain = model(IDS).logits
    run = attach(model, ContinuumAttention.neutral(), backend="reference")
    found = run(IDS).logits
    run.close()
    assert torch.equal(found, plain)


def test_errors() -> None:
    for weights, rule in (((), "must hold one"), ((1.0, 0.0), "each must be above 0"), ((1.0, torch.inf), "finite")):
        with pytest.raises(FieldError, match=rf"ContinuumAttention.weights = .*: .*{rule}"):
            ContinuumAttention(weights)
    for places in ((), (1.0,), (0.0, 0.0, 1.0), (0.0, 2.0, 1.0)):
        with pytest.raises(FieldError, match=r"ContinuumAttention.of\(\).places = .*: must ascend, and be two or more"):
            ContinuumAttention.of(places)
    bare = Bare()
    assert bare.run(ContinuumAttention(WEIGHTS), "reference")
    with pytest.raises(SiteError, match=r"layer 0: has weights of 18 samples, and there is a token at place 18"):
        bare.run(ContinuumAttention(WEIGHTS[:18]), "reference")
