"""Where sums do not go on, and which keys count, on calls without a model."""

from __future__ import annotations

from dataclasses import replace

import torch

from heedful.conformance.bare import Bare, Shape
from heedful.core.positions import Positions
from heedful.kit.running import Running, text_keys


def test_sums_go_on_where_those_of_all_texts_ended() -> None:
    bare = Bare(Shape(q=3, k=8))
    for ends, goes_on in (([5, 5], True), ([5, 4], False), ([4, 4], False)):
        bare.call.state.cache["end"] = torch.tensor(ends)
        found = Running(bare.call, bare.k)
        assert found.goes_on == goes_on
        assert found.cut(bare.k).shape[2] == (3 if goes_on else 8)


def test_keys_that_count_are_held_and_no_padding() -> None:
    text = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    call = Bare(Shape(q=6, k=6), text=text).call
    found = text_keys(call, 6)
    assert found is not None
    assert found.expand(2, 2, 6)[:, 0].tolist() == text.tolist()
    held = torch.tensor([[[True] * 5 + [False]], [[False, True] * 3]])
    keys = replace(Positions.row(0, 6), is_filled=held)
    found = text_keys(replace(call, keys=keys), 6)
    assert found is not None
    assert found.expand(2, 2, 6)[:, 0].tolist() == (held[:, 0] & text).tolist()
    assert text_keys(Bare(Shape(q=6, k=6)).call, 6) is None
