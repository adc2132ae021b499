"""Parts of the choice of blocks that no method's own numbers show."""

from __future__ import annotations

from dataclasses import replace

import torch

from heedful.conformance.bare import Bare, Shape
from heedful.kit.blocks import Grid, density


def test_places_that_are_not_known_are_counted_from_the_last_key() -> None:
    """A call whose positions tell no first index has its queries at the end of the keys."""
    call = Bare(Shape(b=1, q=5, k=13)).call
    lost = replace(call, queries=replace(call.queries, first=None), keys=replace(call.keys, first=None))
    known, found = Grid.of(call, 4), Grid.of(lost, 4)
    assert known is not None
    assert found is not None
    assert known.start.tolist() == found.start.tolist() == [8]
    assert torch.equal(found.band(3), known.band(3))
    assert found.band(3)[0, 0].tolist() == [[False, True, True, False], [False, False, True, True]]


def test_the_density_of_few_blocks() -> None:
    one = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    assert density(one, one).tolist() == [1.0]
    assert density(one, ~one).tolist() == [0.0], "of no open block"
    four = torch.tensor([[True, True, False], [True, False, True]]).view(1, 1, 2, 3)
    assert density(torch.tensor([[True, False, True], [True, False, True]]).view(1, 1, 2, 3), four).tolist() == [0.75]
