"""What one step of a stack leaves for the next at the same site."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful import Method, Site
from heedful.authoring import Call, Sum, at, reads
from heedful.conformance.bare import Bare

from .samples import PAPER
from .test_engine import run


class Raised(Method):
    """Gives weight to every pair, masked ones too."""

    paper = PAPER

    @at(Site.PATTERN)
    def lift(self, weights: Tensor, call: Call) -> Tensor:
        return weights + 1


class Doubled(Method):
    paper = PAPER

    @at(Site.SCORES)
    def double(self, scores: Tensor, call: Call) -> Tensor:
        return scores * 2


class Kept(Method):
    """Notes the pairs that are to be seen, and the weight on the others."""

    paper = PAPER

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Sum:
        keep = torch.ones_like(weights, dtype=torch.bool) if call.keep is None else call.keep.expand_as(weights)
        SEEN.append((keep, weights.masked_fill(keep, 0.0)))
        return Sum(weights.sum())


SEEN: list[tuple[Tensor, Tensor]] = []


def test_weight_on_masked_pairs_is_gone_before_the_next_step() -> None:
    SEEN.clear()
    run(Raised() | Kept(), Bare())
    ((keep, leaked),) = SEEN
    assert not keep.all()
    assert not leaked.any()


def test_a_score_that_overflowed_before_any_step_is_not_taken_for_a_mask() -> None:
    SEEN.clear()
    bare = Bare()
    bare.q[:, :, 0], bare.k[:, :, 0] = -1e30, 1e30
    run(Doubled() | Kept(), bare)
    ((keep, _),) = SEEN
    assert keep[..., 0, 0].all()
