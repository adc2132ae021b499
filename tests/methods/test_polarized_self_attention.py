"""PolarizedSelfAttention against the paper's two gates, patch by patch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import Causal, Layer, Mask
from heedful.core.errors import FieldError, SiteError
from heedful.methods import PolarizedSelfAttention
from tests.images_by_hand import agree, image_call, image_of, learns_of_an_image, tokens_of

E = 6


def _channels(patches: list[Tensor], p: dict[str, Tensor]) -> Tensor:
    weights = torch.stack([p["channel_query"][0] @ x for x in patches]).softmax(0)
    pooled = sum(w * (p["channel_value"] @ x) for w, x in zip(weights, patches, strict=True))
    told = p["up"] @ pooled
    centred = told - told.sum() / len(told)
    normed = centred / ((centred**2).sum() / len(told) + 1e-5) ** 0.5
    return 1 / (1 + torch.exp(-(normed * p["norm"] + p["norm_bias"])))


def _patch_gates(patches: list[Tensor], p: dict[str, Tensor]) -> list[Tensor]:
    query = p["patch_query"] @ (sum(patches) / len(patches))
    query = query.exp() / query.exp().sum()
    return [1 / (1 + torch.exp(-(query @ (p["patch_value"] @ x)))) for x in patches]


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(("grid", "before", "after"), [((2, 3), 1, 0), ((3, 2), 0, 2)])
def test_channels_and_patches_are_gated(grid: tuple[int, int], before: int, after: int, sequential: bool) -> None:
    method = PolarizedSelfAttention(sequential)
    call, x = image_call(method, grid, before, after, E)

    def by_hand(tokens: Tensor, p: dict[str, Tensor]) -> Tensor:
        image = image_of(tokens, grid, before)
        patches = list(image.values())
        first = [x * _channels(patches, p) for x in patches]
        if sequential:
            out = [x * g for x, g in zip(first, _patch_gates(first, p), strict=True)]
        else:
            out = [y + x * g for y, x, g in zip(first, patches, _patch_gates(patches, p), strict=True)]
        return tokens_of(dict(zip(image, out, strict=True)), tokens, before)

    agree(method.gate, by_hand, call, x)


def test_an_image_model_is_served_and_learns() -> None:
    learns_of_an_image(PolarizedSelfAttention())


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=400)
    before = torch.get_rng_state()
    found, again = (PolarizedSelfAttention().parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "channel_query": (1, 400), "channel_value": (200, 400), "up": (400, 200), "norm": (400,), "norm_bias": (400,),
        "patch_query": (200, 400), "patch_value": (200, 400),
    }  # fmt: skip
    assert found["norm"].tolist() == [1.0] * 400
    assert found["norm_bias"].tolist() == [0.0] * 400
    other = PolarizedSelfAttention().parameters(replace(layer, number=0))
    for name in ("channel_query", "channel_value", "up", "patch_query", "patch_value"):
        assert torch.equal(found[name], again[name])
        assert not torch.equal(found[name], other[name])
    assert not torch.equal(found["patch_query"], found["patch_value"])


def test_what_cannot_be() -> None:
    assert PolarizedSelfAttention().sequential is False
    with pytest.raises(FieldError, match=r"sequential = False: halves channels, and there are 7"):
        PolarizedSelfAttention().parameters(Layer(0, 1, 1, 7, 7, 7))
    call, x = image_call(PolarizedSelfAttention(), (2, 3), 1, 0, E)
    with pytest.raises(SiteError, match="layer 0: acts on rows and columns of patches that all see one another"):
        PolarizedSelfAttention().gate(x, replace(call, mask=Mask((Causal(),))))
