"""Patches as a map of channels, and weights as torch.nn draws them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heedful.conformance.bare import Bare, Shape
from heedful.core.call import Call
from heedful.core.errors import SiteError
from heedful.core.mask import Causal, Mask
from heedful.core.regions import Region
from heedful.kit.feature_maps import drawn, feature_map, laid_back, with_bias
from heedful.methods import FFNifiedAttention


def _call() -> Call:
    bare = Bare(Shape(q=8, k=8), rules=())
    return replace(bare.call, roles={"patches": Region(((1, 7),), (2, 3))}, mask=Mask())


def test_a_map_has_each_patch_in_its_row_and_column_and_goes_back() -> None:
    method, x = FFNifiedAttention(), torch.arange(2 * 8 * 5.0).view(2, 8, 5)
    image = feature_map(method, _call(), x)
    assert image.shape == (2, 5, 2, 3)
    for row in range(2):
        for column in range(3):
            assert torch.equal(image[:, :, row, column], x[:, 1 + 3 * row + column])
    assert torch.equal(laid_back(method, _call(), image, x), x)
    negative = laid_back(method, _call(), -image.double(), x)
    assert negative.dtype is x.dtype
    assert torch.equal(negative[:, 1:7], -x[:, 1:7])
    assert torch.equal(negative[:, (0, 7)], x[:, (0, 7)])


def test_what_is_no_whole_image_is_refused() -> None:
    call = replace(_call(), layer=3)
    for change in ({"mask": Mask((Causal(),))}, {"roles": {}}, {"cross": True}):
        with pytest.raises(SiteError, match=r"layer 3: acts on rows and columns of patches that all see one another"):
            feature_map(FFNifiedAttention(), replace(call, **change), torch.zeros(2, 8, 5))


def test_weights_reach_as_far_as_those_of_torch() -> None:
    def random() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    for shape, most in (((300, 100), 1 / 10), ((100, 16, 5, 5), 1 / 20), ((400, 1, 25), 1 / 5)):
        weight = drawn(random(), *shape)
        assert weight.shape == shape
        assert 0.98 * most < float(weight.max()) <= most
        assert -most <= float(weight.min()) < -0.98 * most
        both = with_bias(random(), "key", *shape)
        assert list(both) == ["key", "key_bias"]
        assert torch.equal(both["key"], weight)
        assert both["key_bias"].shape == shape[:1]
        assert 0.9 * most < float(both["key_bias"].max()) <= most
        assert -most <= float(both["key_bias"].min()) < -0.9 * most
