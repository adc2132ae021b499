"""RandomFeatureHeads against the sum in loops, and its draw."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.mask import Causal
from heedful.methods import RandomFeatureHeads
from heedful.methods.mechanisms.normalise.random_feature_heads import drawn
from heedful.nn import Attention


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("mean", [0.0, 1.5])
@pytest.mark.parametrize("causal", [False, True])
def test_a_query_adds_up_what_its_matrix_lets_it_see(causal: bool, mean: float, backend: str) -> None:
    bare = Bare(dtype=torch.float64, rules=(Causal(),) if causal else ())
    shape, matrices = bare.shape, drawn(3, 0, 4, 8).double()
    wanted = torch.zeros(shape.b, shape.h, shape.q, shape.dv, dtype=torch.float64)
    for b, h, i in product(range(shape.b), range(shape.h), range(shape.q)):
        seen, group = i + 1 if causal else shape.k, h * shape.g // shape.h
        asked = matrices[h].T @ bare.q[b, h, i] + mean * bare.q[b, h, i]
        for j in range(seen):
            weight = max(0.0, float(shape.d**-0.5 * (asked * bare.k[b, group, j]).sum())) / seen
            wanted[b, h, i] += weight * bare.v[b, group, j]
    heads, _ = bare.run(RandomFeatureHeads(mean, seed=3), backend, tile_rows=5 if backend == "tiled" else None)
    assert close(heads, wanted)


def test_every_head_layer_and_seed_has_a_matrix_of_its_own_and_none_is_learned() -> None:
    one = drawn(0, 0, 3, 400)
    assert one.shape == (3, 400, 400)
    assert (400 * one.var((1, 2)) - 1).abs().max() < 0.02
    others = [drawn(0, 1, 3, 400)[0], drawn(1, 0, 3, 400)[0], one[1]]
    assert all(float((x * one[0]).sum() / one[0].square().sum()) < 0.02 for x in others)
    assert torch.equal(drawn.__wrapped__(0, 0, 3, 400), one)
    names = {name for name, _ in Attention(8, 2, RandomFeatureHeads()).named_parameters()}
    assert names == {name for name, _ in Attention(8, 2).named_parameters()}


def test_a_seed_is_no_less_than_zero_and_a_mean_is_finite() -> None:
    with pytest.raises(FieldError, match=r"RandomFeatureHeads\.mean = inf: must be finite"):
        RandomFeatureHeads(float("inf"))
    with pytest.raises(FieldError, match=r"RandomFeatureHeads\.seed = -1: must be 0 or more"):
        RandomFeatureHeads(seed=-1)
