"""AttentionInAttention against the authors' block, patch by patch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import Causal, Layer, Mask
from heedful.core.errors import FieldError, SiteError
from heedful.methods import AttentionInAttention
from tests.images_by_hand import Image, agree, convolved, image_call, image_of, learns_of_an_image, mean_of, tokens_of

E = 4


def _leaky(image: Image) -> Image:
    return {at: torch.where(x > 0, x, 0.2 * x) for at, x in image.items()}


@pytest.mark.parametrize(
    ("grid", "before", "after", "method"),
    [((2, 3), 1, 0, AttentionInAttention(0.5, 2)), ((3, 2), 0, 2, AttentionInAttention(30.0, 1))],
)
def test_two_branches_mixed_by_the_image(
    grid: tuple[int, int], before: int, after: int, method: AttentionInAttention
) -> None:
    call, x = image_call(method, grid, before, after, E)

    def by_hand(tokens: Tensor, p: dict[str, Tensor]) -> Tensor:
        image = _leaky(convolved(image_of(tokens, grid, before), p["first"]))
        told = p["shares"] @ torch.relu(p["narrow"] @ mean_of(image)) / method.temperature
        share = told.exp() / told.exp().sum()
        gate = convolved(_leaky(convolved(image, p["look"])), p["gate"], p["gate_bias"])
        value = convolved(image, p["value"])
        gated = convolved({at: x / (1 + torch.exp(-gate[at])) for at, x in value.items()}, p["gated"])
        plain = convolved(image, p["plain"])
        mixed = {at: share[0] * gated[at] + share[1] * plain[at] for at in image}
        return tokens_of(convolved(_leaky(mixed), p["last"]), torch.zeros_like(tokens), before)

    agree(method.mix, by_hand, call, x)


def test_an_image_model_is_served_and_learns() -> None:
    learns_of_an_image(AttentionInAttention.example())


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=40)
    before = torch.get_rng_state()
    found, again = (AttentionInAttention().parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    wide, around = (40, 40, 1, 1), (40, 40, 3, 3)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "first": wide, "last": wide, "narrow": (10, 40), "shares": (2, 10), "look": around, "gate": wide,
        "gate_bias": (40,), "value": around, "gated": around, "plain": around,
    }  # fmt: skip
    other = AttentionInAttention().parameters(replace(layer, number=0))
    for name, x in found.items():
        assert torch.equal(x, again[name])
        assert not torch.equal(x, other[name])


def test_what_cannot_be() -> None:
    assert AttentionInAttention() == AttentionInAttention(30.0, 4)
    assert AttentionInAttention.example() == AttentionInAttention(1.0)
    for temperature in (0.0, -1.0, math.inf):
        with pytest.raises(FieldError, match=r"temperature = .*: "):
            AttentionInAttention(temperature)
    with pytest.raises(FieldError, match=r"reduction = 0: must be 1 or more; .*4"):
        AttentionInAttention(reduction=0)
    assert AttentionInAttention(reduction=4).parameters(Layer(0, 1, 1, 4, 4, 4))["narrow"].shape == (1, 4)
    with pytest.raises(FieldError, match=r"reduction = 5: must not be above the 4 channels of the model"):
        AttentionInAttention(reduction=5).parameters(Layer(0, 1, 1, 4, 4, 4))
    method = AttentionInAttention(1.0, 1)
    call, x = image_call(method, (2, 3), 1, 0, E)
    with pytest.raises(SiteError, match="layer 0: acts on rows and columns of patches that all see one another"):
        method.mix(x, replace(call, mask=Mask((Causal(),))))
