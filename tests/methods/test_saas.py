"""SaaS: maps smoothed, parted and set in relation by loops over places, and what that does to a pattern, row by row."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heedful import attach, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call, DenoisingStep, Phase
from heedful.core.errors import FieldError
from heedful.core.regions import PerText, Region
from heedful.core.state import State
from heedful.methods import SaaS
from heedful.methods.intervene.diffusion.saas import otsu

N, ROWS, COLS = 19, 3, 4
PLACES = [5, 6, 7, 8, 9, 10, 13, 14, 15, 16, 17, 18]
TARGET = Region(((5, 11), (13, 19)), (ROWS, COLS))
ROLES = {"source": ((3, 5), (11, 13)), "target": TARGET, "first": ((0, 2),), "second": ((2, 3),)}
Words = tuple[list[int], list[int]]
SOURCE = [3, 4, 11, 12]
WORDS: Words = ([0, 1], [2])


def maps(seed: int, texts: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(texts, 4, N, N, generator=draw, dtype=torch.float64)).softmax(-1)


def bright(places: list[float]) -> list[bool]:
    """Otsu's threshold: of all it is the first at which the variance between both sides is greatest."""
    low, high = min(places), max(places)
    levels = [int((x - low) / (high - low + 1e-8) * 255) for x in places]
    best, found = -1.0, 0
    for threshold in range(256):
        dark, light = ([x for x in levels if (x > threshold) == side] for side in (False, True))
        if dark and light:
            means = sum(dark) / len(dark), sum(light) / len(light)
            between = len(dark) * len(light) * (means[0] - means[1]) ** 2
            if between > best * (1 + 1e-12):
                best, found = between, threshold
    return [x > found for x in levels]


def smoothed(places: list[float], rows: int, cols: int, sigma: float) -> list[float]:
    if not sigma:
        return places
    reach = round(3 * sigma)
    total = sum(math.exp(-(i**2) / (2 * sigma**2)) for i in range(-reach, reach + 1))
    out = [0.0] * len(places)
    for y in range(rows):
        for x in range(cols):
            for j in range(max(0, y - reach), min(rows, y + reach + 1)):
                for i in range(max(0, x - reach), min(cols, x + reach + 1)):
                    near = math.exp(-((y - j) ** 2 + (x - i) ** 2) / (2 * sigma**2))
                    out[y * cols + x] += places[j * cols + i] * near / total**2
    return out


def factors(looks: Tensor, rows: int, cols: int, scale: float, sigma: float) -> Tensor:
    """Of one picture: `[n 1+i]` to `[n i]`."""
    out = torch.ones(rows * cols, looks.shape[1] - 1, dtype=torch.float64)
    for i in range(out.shape[1]):
        mask = bright(smoothed(looks[:, 1 + i].tolist(), rows, cols, sigma))
        source = sum(float(looks[n, 0]) for n in range(len(looks)) if mask[n])
        words = sum(float(looks[n, 1 + i]) for n in range(len(looks)) if mask[n])
        for n in range(len(looks)):
            if mask[n]:
                out[n, i] = scale * source / (words + 1e-6)
    return out


def given(pattern: Tensor, words: Words = WORDS, source: list[int] = SOURCE) -> Tensor:
    """What each place of one picture gives to the source and to either instruction, the mean of heads `[n 3]`."""
    mean = pattern.mean(0)
    return torch.stack(
        [torch.stack([sum(mean[p, k] for k in keys) for keys in (source, *words)]) for p in PLACES]  # type: ignore[misc]
    )


def followed(pattern: Tensor, by: Tensor, words: Words = WORDS) -> Tensor:
    """One picture's pattern `[h q k]`, whose places give more to words."""
    out = pattern.clone()
    for n, p in enumerate(PLACES):
        for i, keys in enumerate(words):
            for k in keys:
                out[:, p, k] *= by[n, i]
        for h in range(len(out)):
            out[h, p] = out[h, p] / sum(float(x) for x in out[h, p])
    return out


class Layers:
    """Two layers of one model, step after step."""

    def __init__(self, method: SaaS, roles: Any = ROLES) -> None:
        self.method, self.runs, self.roles = method, ({}, {}), roles

    def step(self, patterns: list[Tensor], step: DenoisingStep | None) -> list[Tensor]:
        forward: dict[str, Any] = {}
        return [
            self.method.follow(x, replace(self.call(), denoising=step, state=State(forward=forward, run=run)))
            for x, run in zip(patterns, self.runs, strict=True)
        ]

    def call(self) -> Call:
        return replace(Bare(rules=()).call, roles=self.roles)


METHODS = (SaaS(), SaaS(scale=2.0, blur=0.0), SaaS(blur=0.5))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_step_is_scaled_by_what_all_layers_showed_in_the_step_before(method: SaaS) -> None:
    layers = Layers(method)
    first, second, third = ([maps(10 * i), maps(10 * i + 1)] for i in range(3))
    for found, as_it_was in zip(layers.step(first, DenoisingStep(0, 5)), first, strict=True):
        assert torch.equal(found, as_it_was)
    before = first
    for number, patterns in ((1, second), (2, third)):
        found = layers.step(patterns, DenoisingStep(number, 5))
        for b in range(2):
            by = factors(given(before[0][b]) + given(before[1][b]), ROWS, COLS, method.scale, method.blur)
            assert (by != 1).any()
            for own, pattern in zip(found, patterns, strict=True):
                assert close(own[b], followed(pattern[b], by))
        before = found  # what is read is what was scaled


def test_the_same_step_again_goes_by_the_step_before_and_a_new_picture_by_none() -> None:
    layers = Layers(SaaS())
    patterns = [[maps(i), maps(i + 1)] for i in (0, 2, 4)]
    layers.step(patterns[0], DenoisingStep(0, 9))
    once = layers.step(patterns[1], DenoisingStep(1, 9))
    again = layers.step(patterns[1], DenoisingStep(1, 9))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    for found, own in zip(layers.step(patterns[2], DenoisingStep(0, 9)), patterns[2], strict=True):
        assert torch.equal(found, own)
    fewer = [x[:1] for x in patterns[1]]
    for found, own in zip(layers.step(fewer, DenoisingStep(1, 9)), fewer, strict=True):
        assert torch.equal(found, own), "maps of two pictures say nothing of one"


def test_without_steps_layers_before_tell() -> None:
    patterns = [maps(0), maps(1)]
    found = Layers(SaaS()).step(patterns, None)
    assert torch.equal(found[0], patterns[0])
    for b in range(2):
        assert close(found[1][b], followed(patterns[1][b], factors(given(patterns[0][b]), ROWS, COLS, 1.0, 1.0)))


def test_rows_whose_weights_another_method_made_negative_keep_their_size() -> None:
    signed = [maps(0) - 0.08, maps(1) - 0.08]
    second = Layers(SaaS()).step(signed, None)[1]
    assert bool((signed[1] < 0).any())
    assert close(second.abs().sum(-1), signed[1].abs().sum(-1))
    assert not close(second, signed[1])


def test_each_text_has_words_and_a_source_of_its_own() -> None:
    patterns = [maps(0), maps(1)]
    roles = [ROLES, {"source": ((4, 5), (12, 13)), "first": ((1, 3),), "second": ((11, 12),)}]
    own = {name: PerText(Region(one[name]) for one in roles) for name in ("source", "first", "second")}
    found = Layers(SaaS(), own | {"target": TARGET}).step(patterns, None)[1]
    others: list[tuple[Words, list[int]]] = [(WORDS, SOURCE), (([1, 2], [11]), [4, 12])]
    for b, (words, source) in enumerate(others):
        by = factors(given(patterns[0][b], words, source), ROWS, COLS, 1.0, 1.0)
        assert close(found[b], followed(patterns[1][b], by, words))


def test_what_is_looked_at_hands_no_gradient_on() -> None:
    layers = Layers(SaaS())
    first, second = maps(0).requires_grad_(True), maps(1)
    assert not layers.step([first, second], None)[1].requires_grad


def test_padding_moves_a_picture() -> None:
    patterns, pad = [maps(0, 1), maps(1, 1)], 3
    text = torch.arange(N + pad) >= torch.tensor([pad, 0])[:, None]
    call = replace(Bare(Shape(q=N + pad, k=N + pad), text=text, rules=()).call, roles=ROLES, state=State())
    for x in patterns:
        found = SaaS().follow(torch.cat([nn.functional.pad(x, (a, pad - a) * 2) for a in (pad, 0)]), call)
    wanted = Layers(SaaS()).step(patterns, None)[1][0]
    assert close(found[0, :, pad:, pad:], wanted)
    assert close(found[1, :, :N, :N], wanted)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0])
def test_a_smoothed_map_is_as_high_as_before_but_at_its_borders(sigma: float) -> None:
    drawn = torch.rand(2, 2, ROWS, COLS, generator=torch.Generator().manual_seed(5))
    found = SaaS(blur=sigma)._smoothed(drawn)
    for one, wanted in zip(found.flatten(0, 1), drawn.flatten(0, 1), strict=True):
        assert close(one.flatten(), torch.tensor(smoothed(wanted.flatten().tolist(), ROWS, COLS, sigma)))


def test_what_goes_to_a_sink_stays_there() -> None:
    patterns = [maps(0), maps(1)]
    patterns[1][:, 1] /= 2  # the other half of what this head gives
    found = Layers(SaaS()).step(patterns, None)[1].sum(-1)
    assert close(found, torch.tensor([1.0, 0.5, 1.0, 1.0]).double()[:, None].expand(2, 4, N))


def test_without_a_grid_a_picture_is_a_row_and_heights_of_maps_do_not_matter() -> None:
    looks = torch.rand(2, 12, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    row = SaaS().factors(looks, Region(TARGET))
    laid = SaaS(scale=3.0).factors(1000 * looks, TARGET)
    for b in range(2):
        assert close(row[b], factors(looks[b], 1, 12, 1.0, 1.0))
        assert close(laid[b], factors(1000 * looks[b], ROWS, COLS, 3.0, 1.0))
    with pytest.raises(FieldError, match="must have rows and columns"):
        SaaS().factors(looks, Region(TARGET, (12,)))


def test_words_that_are_given_nothing_are_multiplied_by_a_finite_number() -> None:
    looks = torch.zeros(1, 12, 2, dtype=torch.float64)
    looks[0, :, 0] = 1.0
    assert close(SaaS(blur=0.0).factors(looks, TARGET), torch.ones(1, 12, 1, dtype=torch.float64)), "an even map"
    looks[0, 3, 1] = 1e-7
    found = SaaS(blur=0.0).factors(looks, TARGET)
    assert close(found[0, 3], torch.tensor([1 / (1e-7 + 1e-6)], dtype=torch.float64))


def test_the_threshold() -> None:
    drawn = torch.rand(5, 2, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3
    found = otsu(drawn)
    for one, mask in zip(drawn.flatten(0, 1), found.flatten(0, 1), strict=True):
        assert mask.tolist() == bright(one.tolist())
    assert otsu(torch.tensor([0.0, 0.1, 0.9, 1.0])).tolist() == [False, False, True, True]
    assert otsu(torch.tensor([0.0, 0.0, 1.0])).tolist() == [False, False, True]
    assert not otsu(torch.full((4,), 0.3)).any()


def test_in_a_model_it_acts_from_the_second_step_on() -> None:
    model = models.tiny("vit", image_size=32, num_hidden_layers=3, initializer_range=0.3, dtype=torch.float64)
    roles = {"source": ((1, 17),), "target": Region(((17, 65),), (6, 8)), "first": ((0, 1),)}
    inputs = {"pixel_values": models.tiny_inputs(model)["pixel_values"].double()}
    with torch.no_grad(), attach(model, SaaS(instructions=("first",)), roles=roles) as run:
        found = []
        for number in (0, 1, 4, 5):
            with run.denoising(number, of=10):
                found.append(run(**inputs).logits)
    with torch.no_grad():
        plain = model(**inputs).logits
    assert [close_model(x, plain) for x in found] == [True, False, False, True]


def test_when_it_rests() -> None:
    call = Layers(SaaS()).call()
    assert not SaaS().idle(call)
    assert [SaaS().idle(replace(call, denoising=DenoisingStep(i, 10))) for i in (0, 4, 5)] == [False, False, True]
    assert not SaaS(until=0.0).idle(replace(call, denoising=DenoisingStep(0, 10)))
    assert SaaS().idle(replace(call, cross=True))
    assert SaaS().idle(replace(call, phase=Phase.DECODE))


def test_what_cannot_be() -> None:
    assert SaaS() == SaaS(1.0, 0.4, 1.0, "source", "target", ("first", "second"))
    assert SaaS.example() == SaaS(3.0, 0.4, 1.0, "bos", "answer", ("marked",))
    wrongs: list[dict[str, Any]] = [
        {"scale": 0.0}, {"scale": -1.0}, {"scale": float("inf")}, {"until": -0.1}, {"until": 1.1}, {"blur": -0.1},
        {"blur": 16.1}, {"source": ""}, {"target": ""}, {"instructions": ()}, {"instructions": ("first", "")},
    ]  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(FieldError, match=rf"SaaS\.{next(iter(wrong))} = "):
            SaaS(**wrong)
    for fine in ({"until": 0.0}, {"until": 1.0}, {"blur": 0.0}, {"blur": 16.0}):
        SaaS(**fine)  # type: ignore[arg-type]
