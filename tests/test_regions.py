"""Roles with a grid, and where an image's patches stand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.grids import grid_of, regions
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.positions import Positions
from heedful.core.regions import Region, coordinates, marked, numbers, span_of
from heedful.core.sites import Site, at, reads

from .kernel_calls import a_call

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
    for i, place in zip((1, 2, 3, 6, 7, 8), product(range(2), range(3)), strict=True):
        want[i] = list(place)
    assert found == want
    assert marked(region, torch.arange(10)).nonzero().flatten().tolist() == [1, 2, 3, 6, 7, 8]
    assert numbers(region, torch.arange(10)).tolist() == [-1, 0, 1, 2, -1, -1, 3, 4, 5, -1]


def test_a_grid_holds_its_spans() -> None:
    assert [Region(spans).tokens for spans in ((), ((3, 4),), ((1, 3), (4, 8)))] == [0, 1, 6]
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
    found = regions(model, (2, 2), 5)
    assert found == {"patches": ((1, 5),), "cls": ((0, 1),)}
    assert found["patches"].grid == (2, 2)
    assert regions(model, (2, 2), 4) == regions(model, (2, 2), 7) == {}


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


class Faint(Method):
    """Halves what the marked keys get."""

    paper = Spy.paper

    @at(Site.PATTERN)
    def dim(self, pattern: Tensor, call: Call) -> Tensor:
        kept = pattern.where(~call.spread(call.marked("marked"))[:, :, None], pattern / 2)
        return kept / kept.sum(-1, keepdim=True)


ALONE = [{"marked": ((1, 3), (6, 7))}, {"marked": ((4, 5),)}]


def two_texts(pad: int = 5) -> tuple[list[Tensor], Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    long, short = (torch.randint(3, 127, (1, n), generator=draw) for n in (12, 12 - pad))
    mask = torch.cat([torch.ones_like(long), torch.nn.functional.pad(torch.ones_like(short), (pad, 0))])
    return [long, short], torch.cat([long, torch.nn.functional.pad(short, (pad, 0))]), mask


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_each_text_of_a_batch_has_its_own_spans(backend: str) -> None:
    model = models.tiny("llama").eval()
    texts, ids, mask = two_texts()
    with attach(model, Faint(), backend=backend, tile_rows=4) as run, torch.no_grad():
        alone = []
        for text, run.roles in zip(texts, ALONE, strict=True):
            alone.append(run(input_ids=text).logits[:, -1])
        run.roles = ALONE
        both = run(input_ids=ids, attention_mask=mask).logits[:, -1]
        run.roles = ALONE[0]
        same = run(input_ids=ids, attention_mask=mask).logits[:, -1]
    assert close(both, torch.cat(alone))
    assert not close(same, torch.cat(alone))


def test_beams_keep_the_spans_of_their_text() -> None:
    model = models.tiny("llama").eval()
    texts, ids, mask = two_texts()
    how = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    with attach(model, Faint(), roles=ALONE) as run:
        both = run.generate(input_ids=ids, attention_mask=mask, **how)[:, -5:]
        for row, (text, run.roles) in enumerate(zip(texts, ALONE, strict=True)):
            assert both[row].tolist() == run.generate(input_ids=text, **how)[0, -5:].tolist()


def test_a_role_that_one_text_lacks_is_empty_there() -> None:
    SEEN.clear()
    _, ids, mask = two_texts()
    with attach(models.tiny("llama").eval(), Spy(), roles=[{"marked": ((0, 2),)}, {}]) as run, torch.no_grad():
        run(input_ids=ids, attention_mask=mask)
    assert SEEN[0].marked("marked").sum(-1).flatten().tolist() == [2, 0]
    assert SEEN[0].marked_queries("marked")[1].sum() == 0
    with pytest.raises(FieldError, match=r"as many spans in each text.*\[1, 1\]"):
        SEEN[0].bounds("marked")
    with pytest.raises(FieldError, match="each text has its own 'marked'"):
        SEEN[0].region("marked")


@pytest.mark.parametrize(
    ("roles", "rule"),
    [
        ("marked", "must be (a mapping of names to spans|Mapping)"),
        ([], "must be a mapping of names to spans"),
        ([{"marked": ((0, 2),)}, None], "must be (a mapping of names to spans|Mapping)"),
        ({3: ((0, 2),)}, "must be (a word|Mapping)"),
        ({"marked": (0, 2)}, "each its start and its stop"),
        ({"marked": ((0.5, 2),)}, "each its start and its stop"),
        ({"marked": None}, "(each its start and its stop|must be Mapping)"),
        ({"marked": ((3, 3),)}, "a stop behind it"),
        ([{"marked": ((-1, 3),)}], "a stop behind it"),
    ],
)
def test_says_what_is_wrong_with_roles(roles: object, rule: str) -> None:
    model = models.tiny("llama")
    with pytest.raises(FieldError, match=rule):
        attach(model, Faint(), roles=roles)
    with attach(model, Faint(), roles=ALONE) as run:
        with pytest.raises(FieldError, match=rule):
            run.roles = roles
        assert run.roles["marked"][1] == ((4, 5),)
        with pytest.raises(FieldError, match="names spans for 2 texts, and the batch has 3"):
            run(input_ids=torch.ones(3, 8, dtype=torch.long))
        run(input_ids=torch.ones(2, 8, dtype=torch.long))


def test_places_that_are_known_to_be_alike_are_looked_up_once() -> None:
    call = a_call((1, 2, 2, 12, 12, 4, 4), ())
    call = replace(call, roles={"patches": Region(((2, 11),), (3, 3))})
    queries, keys = call.coordinates("patches")
    assert queries is keys
    for places in (
        call.keys.take(slice(1, 12)), call.keys.take(slice(0, 11)), call.keys.take(torch.arange(12)),
        Positions.row(0, 12, pad=torch.tensor([2])),
    ):  # fmt: skip
        assert not call.queries.alike(places)
        assert not places.alike(call.queries)
        one, other = replace(call, keys=places).coordinates("patches")
        assert one.equal(queries)
        assert other.equal(coordinates(call.region("patches"), places.position))


def test_which_span_a_position_lies_in() -> None:
    position = torch.tensor([[-1, 0, 2, 3, 4, 6, 7, 9]])
    assert span_of(((3, 5), (0, 3), (6, 7)), position).tolist() == [[-1, 1, 1, 0, 0, 2, -1, -1]]
    with pytest.raises(FieldError, match="must not overlap"):
        span_of(((0, 4), (3, 5)), position)
