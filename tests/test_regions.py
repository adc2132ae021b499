"""Roles with a grid, and where an image's patches stand."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.grids import grid_of, patches
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.regions import Region, coordinates, marked
from heedful.core.sites import Site, reads

SEEN: list[Call] = []


class Spy(Method):
    paper = Paper("none", "A test", "heedful", 2026)

    @reads(Site.SCORES)
    def keep(self, scores: Tensor, call: Call) -> None:
        SEEN.append(call)


def test_coordinates_run_row_by_row_through_all_spans() -> None:
    region = Region(((1, 4), (6, 9)), (2, 3))
    found = coordinates(region, torch.arange(10)).tolist()
    want = [[-1, -1]] * 10
    for at, place in zip((1, 2, 3, 6, 7, 8), product(range(2), range(3)), strict=True):
        want[at] = list(place)
    assert found == want
    assert marked(region, torch.arange(10)).nonzero().flatten().tolist() == [1, 2, 3, 6, 7, 8]


def test_a_grid_holds_its_spans() -> None:
    with pytest.raises(FieldError, match="must hold the 196 positions"):
        Region(((1, 197),), (7, 27))
    with pytest.raises(FieldError, match="has no grid"):
        coordinates(Region(((0, 2),)), torch.arange(3))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_an_image_has_its_patches_where_they_are(backend: str) -> None:
    """8 x 24 pixels in patches of 4: two rows of six, behind the class token, whatever the tile."""
    model = models.tiny("vit").eval()
    SEEN.clear()
    with attach(model, Spy(), backend=backend, tile_rows=3) as run, torch.no_grad():
        run(pixel_values=torch.randn(1, 3, 8, 24), interpolate_pos_encoding=True)
        run(torch.randn(1, 3, 8, 8))  # by its place
    wide = [c for c in SEEN if len(c.keys) == 13]
    assert wide
    for call in wide:
        assert call.region("patches") == ((1, 13),)
        queries, keys = call.coordinates("patches")
        want = torch.tensor([[-1, -1], *product(range(2), range(6))])
        assert torch.equal(keys[0, 0], want)
        assert torch.equal(queries[0, 0], want[call.rows])
        assert torch.equal(call.marked_queries("patches")[0, 0], torch.arange(13)[call.rows] > 0)
    square = [c for c in SEEN if len(c.keys) == 5]
    assert square[0].region("patches").grid == (2, 2)


def test_what_is_not_certain_is_no_grid() -> None:
    model = models.tiny("vit")
    assert grid_of(model, {"pixel_values": torch.zeros(1, 3, 8, 8)}) == (2, 2)
    assert grid_of(model, {"pixel_values": torch.zeros(1, 3, 8, 9)}) is None
    assert grid_of(model, {}) is None
    assert grid_of(models.tiny("llama"), {"pixel_values": torch.zeros(1, 3, 8, 8)}) is None
    assert patches(model, (2, 2), 5) == ((1, 5),)
    assert patches(model, (2, 2), 4) is None
    assert patches(model, (2, 2), 7) is None


def test_text_has_no_patches_and_a_given_role_stands() -> None:
    model = models.tiny("clip").eval()
    SEEN.clear()
    with attach(model, Spy()) as run, torch.no_grad():
        run(input_ids=torch.randint(3, 100, (1, 5)), pixel_values=torch.randn(1, 3, 8, 8))
    by_part = {c.name.split(".")[0]: c for c in SEEN}
    assert by_part["vision_model"].region("patches").grid == (2, 2)
    with pytest.raises(FieldError, match="has no spans named 'patches'"):
        by_part["text_model"].region("patches")
    SEEN.clear()
    with attach(models.tiny("vit"), Spy(), roles={"patches": ((2, 3),)}) as run, torch.no_grad():
        run(torch.randn(1, 3, 8, 8))  # by its place
    assert SEEN[0].region("patches") == ((2, 3),)
