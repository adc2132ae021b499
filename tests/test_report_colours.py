"""The colours of maps."""

import itertools
import math

import torch

from heedful.core.figures import HeadMap
from heedful.report.colours import SCALE, SIGNED, template
from heedful.report.plots import head_map


def lightness(colour: str) -> float:
    r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b))
    long = 0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b
    middle = 0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b
    short = 0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b
    return 0.2104542553 * long ** (1 / 3) + 0.7936177850 * middle ** (1 / 3) - 0.0040720468 * short ** (1 / 3)


def test_the_scale_is_even_to_the_eye():
    steps = [lightness(colour) for colour in SCALE]
    falls = [a - b for a, b in itertools.pairwise(steps)]
    assert min(falls) > 0.075
    assert max(falls) < 0.11
    assert [c for _, c in template(dark=True)["layout"]["colorscale"]["sequential"]] == list(SCALE[::-1])


def test_signed_scales_leave_zero_evenly_on_either_side():
    for dark, colours in SIGNED.items():
        steps = [lightness(colour) for colour in colours]
        middle = len(steps) // 2
        assert (steps[middle] < 0.25) if dark else (steps[middle] > 0.95)
        away = [abs(x - steps[middle]) for x in steps]
        for i in range(1, middle + 1):
            assert abs(away[middle + i] - away[middle - i]) < 0.01
            assert 0.12 < away[middle + i] - away[middle + i - 1] < 0.2


def test_numbers_of_both_signs_are_drawn_so():
    layers = range(1)
    both, given = torch.tensor([[-1.0, 3.0, math.nan]]), torch.tensor([[0.0, 0.5, 1.0]])
    heat = head_map(HeadMap("a", "a", "", layers, both, "nats")).data[0]
    assert (heat.zmin, heat.zmax, heat.autocolorscale) == (-3.0, 3.0, True)
    heat = head_map(HeadMap("a", "a", "", layers, given, "cosine", low=-1, high=1)).data[0]
    assert (heat.zmin, heat.zmax, heat.autocolorscale) == (-1, 1, True)
    heat = head_map(HeadMap("a", "a", "", layers, given, "share")).data[0]
    assert (heat.zmin, heat.autocolorscale) == (0.0, None)
