"""Aligned attention patch by patch in loops, distances and offsets as the authors have them, and planted heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, StatisticError
from heedful.methods.observe.offset_local_heads import Aligned, OffsetLocalHeads

METHOD = OffsetLocalHeads(reach=2)
SIDE = 20  # pixels; 5 x 5 patches behind a class token


def pictures(rows: int = 2, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    return torch.randn(rows, 3, *size, generator=torch.Generator().manual_seed(0))


def found(method: OffsetLocalHeads, *batches: Tensor, side: int = SIDE) -> Aligned:
    model = models.tiny("vit", image_size=side)
    with heedful.attach(model, method) as run, torch.no_grad():
        for batch in batches:
            run(pixel_values=batch)
        return run[method]


def by_hand(maps: Tensor, rows: int, cols: int, reach: int) -> tuple[Tensor, float, Tensor]:
    """One head over images, `[b n n]` with a class token: shares of offsets, distance, mean offset."""
    around, distance, centre, count = (
        torch.zeros(2 * reach + 1, 2 * reach + 1).double(),
        0.0,
        torch.zeros(2).double(),
        0,
    )
    for image in maps.double():
        for q in range(rows * cols):
            count += 1
            whole = float(image[1 + q, 1:].sum())
            for k in range(rows * cols):
                weight = float(image[1 + q, 1 + k]) / whole
                down, right = k // cols - q // cols, k % cols - q % cols
                if abs(down) <= reach and abs(right) <= reach:
                    around[down + reach, right + reach] += weight
                y, x = down / (rows - 1), right / (cols - 1)
                distance += weight * math.sqrt(x * x + y * y)
                centre += weight * torch.tensor([y, x])
    return around / count, distance / count, centre / count


def test_is_the_mean_over_patches_with_each_in_the_middle() -> None:
    one, two = pictures(), pictures(3)[2:]
    seen = found(METHOD, one, two)
    model = models.tiny("vit", image_size=SIDE, attn_implementation="eager")
    with torch.no_grad():
        every = [torch.stack(model(pixel_values=x, output_attentions=True).attentions) for x in (one, two)]
    maps = torch.cat(every, 1)  # [layers b h n n]
    assert seen.layers == (0, 1)
    for layer in range(2):
        for head in range(4):
            around, distance, centre = by_hand(maps[layer, :, head], 5, 5, 2)
            assert close(seen.around[layer, head].float(), around.float())
            assert float(seen.distance[layer, head]) == pytest.approx(distance, rel=1e-5)
            assert close(seen.centre[layer, head].float(), centre.float())


def planted(offset: tuple[int, int], grid: tuple[int, int], share: float) -> Tensor:
    """A map in which each patch gives a share to the one so far away, where there is one, and the rest evenly."""
    rows, cols = grid
    n = rows * cols
    map_ = torch.full((n + 1, n + 1), (1 - share) / (n + 1))
    for q in range(n):
        y, x = q // cols + offset[0], q % cols + offset[1]
        map_[1 + q, 1 + y * cols + x if 0 <= y < rows and 0 <= x < cols else 0] += share
    return map_


class Plant(heedful.authoring.Method):
    """Puts maps in the place of a model's own."""

    paper = METHOD.paper
    grid: tuple[int, int]
    offsets: tuple[tuple[int, int], ...]
    share: float

    @heedful.authoring.at(heedful.authoring.Site.PATTERN)
    def put(self, weights: Tensor, call: heedful.authoring.Call) -> Tensor:
        maps = torch.stack([planted(at, self.grid, self.share) for at in self.offsets])
        return maps[:, call.rows][..., call.cols].expand_as(weights).to(weights.dtype)


@pytest.mark.parametrize("size", [(5, 5), (4, 6), (2, 6)])
def test_finds_planted_heads_and_no_others(size: tuple[int, int]) -> None:
    offsets = ((0, 1), (-1, 0), (0, 0), (2, 0))  # two neighbours, the patch itself, two below
    pixels = pictures(2, (4 * size[0], 4 * size[1]))
    model = models.tiny("vit", image_size=4 * max(size))
    method = OffsetLocalHeads(reach=2, share=0.3)
    with heedful.attach(model, Plant(size, offsets, 0.6) | method) as run, torch.no_grad():
        run(pixel_values=pixels, interpolate_pos_encoding=True)
        seen = run[method]
    assert {head: at for head, (at, _) in seen.heads.items() if head[0] == 0} == {(0, 0): (0, 1), (0, 1): (-1, 0)}
    around, distance, centre = by_hand(planted((0, 1), size, 0.6)[None], *size, 2)
    assert close(seen.around[0, 0].float(), around.float())
    assert float(seen.distance[0, 0]) == pytest.approx(distance, rel=1e-5)
    assert close(seen.centre[1, 0].float(), centre.float())
    assert list(seen.heads.values()) == sorted(seen.heads.values(), key=lambda x: -x[1])
    assert "4 offset-local heads: 0." in str(seen)
    assert "above" in str(seen)
    even = by_hand(planted((0, 0), size, 0.0)[None], *size, 2)[1]
    assert close(seen.even.float(), torch.full((2, 4), even))
    assert set(seen.wide) == {(n, h) for n in range(2) for h in range(4) if float(seen.distance[n, h]) >= even}
    told = method.describe(seen)
    assert told.roles[0].heads == {head: share for head, (_, share) in seen.heads.items()}
    first, _, rest = told.findings[0].text.partition(": ")
    assert first == "4 heads look at one neighbour of each patch more than anywhere else"
    assert set(rest.rstrip(".").split(", ")) == {"2 to the right", "2 above"}
    keys = {figure.key: figure for figure in told.figures}
    assert close(
        keys["patch_neighbour"].values[0, :2], torch.tensor([x for _, x in (seen.heads[0, 0], seen.heads[0, 1])])
    )
    strongest = next(iter(seen.heads))
    assert torch.equal(keys["offset_map"].values, seen.around[strongest])
    assert keys["offset_map"].rows == ["-2", "-1", "0", "+1", "+2"]
    assert close(keys["distance_depth"].lines["nearest head"], seen.distance.amin(1))
    assert close(keys["distance_depth"].lines["furthest head"], seen.distance.amax(1))
    assert close(keys["distance_depth"].lines["mean"], seen.distance.mean(1))
    assert keys["offset_heads"].rows[0][0] == strongest


def test_even_heads_are_none() -> None:
    model = models.tiny("vit", image_size=SIDE)
    with heedful.attach(model, Plant((5, 5), ((0, 0),) * 4, 0.0) | METHOD) as run, torch.no_grad():
        run(pixel_values=pictures())
        seen = run[METHOD]
    assert seen.heads == {}
    assert str(seen) == "0 offset-local heads: none"
    told = METHOD.describe(seen)
    assert told.findings[1].text == "No head gives 10% of its attention or more to one neighbour of each patch."
    even = by_hand(planted((0, 0), (5, 5), 0.0)[None], 5, 5, 2)[1]
    wanted = (
        f"heads look {even:.2f} far in layer 0 and {even:.2f} far in layer 1; even attention would look {even:.2f} far"
    )
    assert wanted in told.findings[0].text
    assert [figure.key for figure in told.figures] == ["patch_distance", "patch_neighbour", "distance_depth"]


def test_images_of_unlike_size_are_added_up() -> None:
    one, two = pictures(1), pictures(1, (SIDE, SIDE + 4))
    model = models.tiny("vit", image_size=SIDE)
    with heedful.attach(model, METHOD) as run, torch.no_grad():
        alone = []
        for batch in (one, two):
            run(pixel_values=batch, interpolate_pos_encoding=True)
            alone.append(run[METHOD].around)
    second = (alone[1] * 55 - alone[0] * 25) / 30  # of the second image's 30 patches by themselves
    with heedful.attach(model, METHOD) as run, torch.no_grad():
        run(pixel_values=two, interpolate_pos_encoding=True)
        assert close(run[METHOD].around.float(), second.float())


def test_text_has_no_patches() -> None:
    with heedful.attach(models.tiny("bert"), METHOD) as run, torch.no_grad():
        run(input_ids=torch.randint(3, 100, (1, 9)))
        with pytest.raises(StatisticError, match="has read nothing"):
            run[METHOD]


@pytest.mark.parametrize(("field", "value"), [("reach", 0), ("share", 0.0), ("share", 1.0)])
def test_wrong_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(FieldError, match=field):
        OffsetLocalHeads(**{field: value})


def test_heads_that_look_across_the_image_are_wide() -> None:
    model = models.tiny("vit", image_size=SIDE)
    offsets = ((0, 4), (0, 0), (3, 0), (0, 1))  # across and down as far as may be, at itself, at a neighbour
    with heedful.attach(model, Plant((5, 5), offsets, 0.5) | METHOD) as run, torch.no_grad():
        run(pixel_values=pictures())
        seen = run[METHOD]
    assert list(seen.wide.values()) == sorted(seen.wide.values(), reverse=True)
    assert {head for _, head in seen.wide} == {0, 2}
    assert seen.wide[1, 0] == float(seen.distance[1, 0])
    told = METHOD.describe(seen)
    assert [role.name for role in told.roles] == ["looks at a neighbour", "looks all over the image"]
    assert told.roles[1].heads == seen.wide
    assert told.findings[1].text.endswith("far, and 50% of heads look as far or further.")
    near, far = (float(x) for x in seen.distance.mean(1))
    assert f"heads look {near:.2f} far in layer 0 and {far:.2f} far in layer 1;" in told.findings[1].text


def test_a_head_is_wide_from_even_attention_on() -> None:
    around = torch.zeros(1, 3, 3, 3)
    far, even = torch.tensor([[0.5, 0.4, 0.6]]), torch.tensor([[0.5, 0.5, 0.5]])
    assert Aligned((7,), around, far, torch.zeros(1, 3, 2), even, 0.1).wide == {(7, 2): float(far[0, 2]), (7, 0): 0.5}
