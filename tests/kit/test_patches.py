"""The patches of an image among a call's tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heedful.conformance.bare import Bare, Shape
from heedful.core.call import Call
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Causal, Mask
from heedful.core.positions import Positions
from heedful.core.regions import PerText, Region
from heedful.kit.patches import patch_keys, patch_tokens, require_divides, sides, whole_image
from heedful.methods import BiLevelRoutingAttention

GRID = Region(((1, 3), (4, 8)), (2, 3))


def _call(region: Region = GRID) -> Call:
    bare = Bare(Shape(q=9, k=9), rules=())
    return replace(bare.call, roles={"patches": region}, mask=Mask())


def test_patches_are_found_row_by_row() -> None:
    call = _call()
    assert patch_tokens(BiLevelRoutingAttention(), call).tolist() == [1, 2, 4, 5, 6, 7]
    assert sides(call) == (2, 3)
    spans = Region(((4, 8), (1, 3)), (2, 3))  # the first patches stand behind the others
    assert patch_tokens(BiLevelRoutingAttention(), _call(spans)).tolist() == [4, 5, 6, 7, 1, 2]


def test_keys_are_another_images() -> None:
    spans, method = Region(((4, 8), (1, 3)), (2, 3)), BiLevelRoutingAttention()
    call = _call(spans)
    assert patch_keys(method, replace(call, keys=call.keys.take(slice(1, 9)))).tolist() == [3, 4, 5, 6, 0, 1]
    with pytest.raises(SiteError, match=r"layer 0: 5 of the 2 x 3 patches are among the keys, and all of them are"):
        patch_keys(method, replace(call, keys=call.keys.take(slice(2, 9))))


def test_what_is_an_image_read_at_once() -> None:
    call = _call()
    assert whole_image(call)
    other = Region(((1, 7),), (2, 3))
    for change in (
        {"cross": True}, {"mask": Mask((Causal(),))}, {"roles": {}}, {"roles": {"patches": ((1, 7),)}},
        {"roles": {"patches": Region(((1, 7),), (6,))}}, {"roles": {"patches": Region(((1, 7),), (1, 2, 3))}},
        {"queries": Positions.row(5, 4)}, {"roles": {"patches": PerText((GRID, other))}},
    ):  # fmt: skip
        assert not whole_image(replace(call, **change)), change


def test_missing_patches_are_refused() -> None:
    with pytest.raises(SiteError, match=r"layer 0: 8 of the 3 x 4 patches are among the tokens, and all of them are"):
        patch_tokens(BiLevelRoutingAttention(), _call(Region(((1, 13),), (3, 4))))


def test_patches_that_are_there_twice_are_refused() -> None:
    """As in a row in which two texts are packed, that each have some."""
    call = _call()
    packed = call.queries.take(torch.tensor([*range(9), *range(4)]))
    with pytest.raises(
        SiteError, match=r"layer 0: 8 of the 2 x 3 patches are among the tokens, and each is needed once"
    ):
        patch_tokens(BiLevelRoutingAttention(), replace(call, queries=packed))


@pytest.mark.parametrize("grid", [(4, 6), (6, 4)])
def test_fields_that_do_not_divide_the_grid_are_refused(grid: tuple[int, int]) -> None:
    call = _call(Region(((0, 24),), grid))
    require_divides(BiLevelRoutingAttention(2), "regions", call)
    rule = rf"BiLevelRoutingAttention.regions = 3: must divide both sides of the {grid[0]} x {grid[1]} patches of "
    with pytest.raises(FieldError, match=rule + r"layer 0; .*2"):
        require_divides(BiLevelRoutingAttention(3), "regions", call)
