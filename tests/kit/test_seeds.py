"""What stands for a fit where there is none."""

from __future__ import annotations

import pytest
import torch

from heedful.core.errors import FieldError
from heedful.kit.seeds import drawn_for, seed_of
from heedful.methods import LearnableTaskVector


def test_a_seed_stands_for_a_fit_and_without_either_the_fit_is_named() -> None:
    assert seed_of(LearnableTaskVector(seed=3), "vectors") == 3
    missing = r"vectors = None: must be fitted with heedful.fit\(\), or seed be given.*heedful.fit\(LearnableTaskVector"
    with pytest.raises(FieldError, match=missing):
        seed_of(LearnableTaskVector(), "vectors")
    told = r"to shots, or seed be given; for example vectors=heedful.fit\(LearnableTaskVector\(\), model, \[\]\)$"
    with pytest.raises(FieldError, match=told):
        seed_of(LearnableTaskVector(), "vectors", "to shots", "[]")


def test_each_layer_and_seed_draws_its_own() -> None:
    draws = [
        torch.rand(3, generator=drawn_for(LearnableTaskVector(seed=seed), "vectors", layer))
        for seed, layer in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    wanted = torch.rand(3, generator=torch.Generator().manual_seed(4099 + 1))
    assert torch.equal(draws[3], wanted)  # what was measured with a seed can be drawn again
