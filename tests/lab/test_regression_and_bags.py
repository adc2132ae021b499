"""Planes that points before settle, bags that one digit names, and where a mechanism acts in them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Generator, Tensor

from heedful import attach
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.laboratory import costs
from heedful.laboratory.bags import PIXELS, PLAIN, TRIED, Bags, _OnIt
from heedful.laboratory.images import digits, parted
from heedful.laboratory.records import Trainings
from heedful.laboratory.regression import Regression
from heedful.methods import EfficientProbing
from tests.lab.small import Halved

FEW = Regression(tokens=4 * 32, rows=2, width=16, layers=1, heads=2)
SMALL = Bags(tokens=4 * 50, side=5, rows=2, width=16, layers=2, heads=2)


def least_squares(points: Tensor, values: Tensor) -> Tensor:
    """What the shortest plane through all points before it says of the last one."""
    planes = torch.linalg.pinv(points[:, :-1].double()) @ values[:, :-1, None].double()
    return (points[:, -1:].double() @ planes)[:, 0, 0].float()


def test_points_before_settle_a_plane_when_there_are_enough() -> None:
    course = Regression()
    drawn = course.drawn(Generator().manual_seed(0), 4000)
    points, values = drawn["points"], drawn["values"]
    assert points.shape == (4000, 8, 3)
    assert values.square().mean().item() == pytest.approx(1, abs=0.05)
    for seen in range(1, 6):
        error = (least_squares(points[:, : seen + 1], values[:, : seen + 1]) - values[:, seen]).square().mean().item()
        assert error == pytest.approx(max(0.0, 1 - seen / 3), abs=0.07)


def test_points_and_values_stand_by_turns() -> None:
    model, drawn = FEW.model(0), FEW.drawn(Generator().manual_seed(1), 2)
    rows: list[Tensor] = []
    model.shown.register_forward_pre_hook(lambda _, given: rows.append(given[0]))
    model(**drawn)
    points, values, zero = drawn["points"][0].tolist(), drawn["values"][0].tolist(), [0.0] * 3
    turns = [row for point, value in zip(points, values, strict=True) for row in ([*point, 0.0], [*zero, value])]
    assert rows[0][0].tolist() == turns[:-1]


def test_weights_below_nothing_count_by_their_size() -> None:
    weights = torch.tensor([0.5, -0.25, 0.25, -1.0]).expand(1, 2, 4, 4)
    call = SimpleNamespace(rows=slice(None))
    assert _OnIt((2,)).read(weights, call).value.tolist() == [0.5, 0.5]


def test_a_value_is_told_before_it_is_shown() -> None:
    model = FEW.model(0).eval()
    drawn = FEW.drawn(Generator().manual_seed(1), 3)
    other = {"points": drawn["points"].clone(), "values": drawn["values"].clone()}
    other["values"][:, 4] += 1
    with torch.no_grad():
        before, after = model(**drawn)["told"], model(**other)["told"]
        changed = (before != after).any(0)
    assert changed.tolist() == [False] * 5 + [True] * 3
    assert float(model(**drawn)["loss"].detach()) == pytest.approx(float((before - drawn["values"]).square().mean()))
    other = {"points": drawn["points"].clone(), "values": drawn["values"]}
    other["points"][:, 4] += 1
    with torch.no_grad():
        assert (before != model(**other)["told"]).any(0).tolist() == [False] * 4 + [True] * 4
    assert FEW.batch(0, Generator())["values"].numel() * 2 == FEW.a_batch


def test_errors_are_of_the_points_that_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "TURNS", 1)
    kept = Trainings(tmp_path)
    made = kept.record(FEW, Halved(), 0)
    with kept.opened(FEW, Halved(), 0) as run:
        random = Generator().manual_seed(10_000)
        tried = [FEW.drawn(random, 512, times) for times in (1, 2)]
        errors = [(run(**x)["told"] - x["values"]).square().mean(0) for x in tried]
    assert made["error"] == pytest.approx(float(errors[0][7]), rel=1e-5)
    assert made["early error"] == pytest.approx(float(errors[0][2]), rel=1e-5)
    assert made["error at 2 x"] == pytest.approx(float(errors[1][15]), rel=1e-5)


def test_a_bag_is_named_by_one_digit() -> None:
    course = Bags(rows=64)
    mine, tried = parted(1)
    assert sorted([*mine.tolist(), *tried.tolist()]) == list(range(1797))
    batch = course.batch(1, Generator().manual_seed(1))
    shown, labels = digits()
    known = {shown[i].numpy().tobytes(): int(labels[i]) for i in mine.tolist()}
    for field, label in zip(batch["pixel_values"][:, 0], batch["labels"].tolist(), strict=True):
        cells = [
            field[y : y + PIXELS, x : x + PIXELS].contiguous().numpy().tobytes()
            for y in range(0, 40, 8)
            for x in range(0, 40, 8)
        ]
        assert [d - PLAIN for d in map(known.__getitem__, cells) if d >= PLAIN] == [label]
    pixels, named, places = course.drawn(Generator().manual_seed(2), tried, 8, 3)
    for field, label, place in zip(pixels[:, 0], named.tolist(), places.tolist(), strict=True):
        y, x = divmod(place, 3)
        cell = field[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        assert label + PLAIN in labels[(shown == cell).flatten(1).all(1)].tolist()


@pytest.mark.parametrize("count", [6, 1200])  # of so many, not all rows are in one tile
def test_what_the_class_token_gives_the_named_digit_is_what_the_map_says(count: int) -> None:
    model = SMALL.model(0).eval()
    model.set_attn_implementation("eager")
    pixels, _, places = SMALL.drawn(Generator().manual_seed(0), parted(0)[0], count, 5)
    reader = _OnIt(tuple(places.tolist()))
    with torch.no_grad():
        maps = model(pixel_values=pixels, output_attentions=True).attentions
        with attach(model, reader, only=SMALL.only) as run:
            run(pixel_values=pixels)
    assert len(run[reader]) == 1
    found = next(iter(run[reader].values())).value
    wanted = torch.stack([maps[1][n, :, 0, 1 + place] for n, place in enumerate(places.tolist())]).mean(0)
    assert close(found, wanted)


def test_bags_are_measured_at_their_size_and_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "TURNS", 1)
    kept = Trainings(tmp_path)
    made = kept.record(SMALL, Halved(), 3)
    random, tried = Generator().manual_seed(10_003), parted(3)[1]
    right = {}
    with kept.opened(SMALL, Halved(), 3) as run:
        assert [name for name in run.layer_names if name] == ["vit.layers.1.attention"]
        for name, side in (("accuracy", 5), ("larger", 10)):
            pixels, labels, _ = SMALL.drawn(random, tried, TRIED, side)
            assert pixels.shape[-1] == PIXELS * side
            best = run(pixel_values=pixels, interpolate_pos_encoding=side == 10).logits.argmax(-1)
            right[name] = float((best == labels).float().mean())
    assert made["accuracy"] == pytest.approx(right["accuracy"])
    assert made["larger"] == pytest.approx(right["larger"])
    pixels, _, places = SMALL.drawn(Generator().manual_seed(10_003), tried, TRIED, 5)
    reader = _OnIt(tuple(places.tolist()))
    with kept.opened(SMALL, Halved(), 3, reader) as run:
        run(pixel_values=pixels)
        (heads,) = run[reader].values()
    assert made["off"] == pytest.approx(1 - float(heads.value.max()))
    with pytest.raises(FieldError, match="must be enough for one batch"):
        Bags(tokens=3)


def test_what_pools_behind_the_layer_is_not_told_by_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "TURNS", 1)
    made = Trainings(tmp_path).record(SMALL, EfficientProbing(4), 0)
    assert {"accuracy", "larger"} <= set(made.numbers)
    assert "off" not in made.numbers
