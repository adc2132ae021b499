"""FFNifiedAttention against the authors' token mixer, patch by patch and channel by channel."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape, parameters
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Causal, Mask
from heedful.core.regions import Region
from heedful.methods import FFNifiedAttention
from tests.images_by_hand import learns_of_an_image

E = 6


def _image(grid: tuple[int, int], before: int, after: int, kernel: int) -> tuple[Call, dict[str, Tensor], Tensor]:
    n = before + math.prod(grid) + after
    bare = Bare(Shape(q=n, k=n, e=E), dtype=torch.float64, rules=())
    params = parameters(FFNifiedAttention(kernel), bare.shape.layer, torch.float64)
    call = replace(bare.call, roles={"patches": Region(((before, n - after),), grid)}, mask=Mask(), params=params)
    return call, params, torch.randn(2, n, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


Image = dict[tuple[int, int], Tensor]


def _around(image: Image, kernel: Tensor, bias: Tensor) -> Image:
    """Each channel of each patch: a weight for each neighbour, and none for what lies off the image."""
    half, found = kernel.shape[-1] // 2, {}
    for y, x in image:
        total = bias
        for dy in range(-half, half + 1):
            for dx in range(-half, half + 1):
                if (y + dy, x + dx) in image:
                    total = total + kernel[:, 0, half + dy, half + dx] * image[y + dy, x + dx]
        found[y, x] = total
    return found


def _by_hand(hidden: Tensor, p: dict[str, Tensor], grid: tuple[int, int], before: int) -> Tensor:
    (_, cols), out = grid, []
    for tokens in hidden:
        image = {
            divmod(i, cols): p["query"] @ tokens[before + i] + p["query_bias"] for i in range(math.prod(grid))
        }  # fmt: skip
        image = _around(image, p["key"], p["key_bias"])
        image = {at: x * (1 + torch.erf(x / math.sqrt(2))) / 2 for at, x in image.items()}
        image = _around(image, p["value"], p["value_bias"])
        patches = [image[divmod(i, cols)] for i in range(math.prod(grid))]
        others = [torch.zeros_like(tokens[0])] * (len(tokens) - before - math.prod(grid))
        out.append(torch.stack([torch.zeros_like(tokens[0])] * before + patches + others))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("grid", "before", "after", "kernel"), [((3, 4), 1, 0, 3), ((2, 3), 0, 2, 5), ((3, 3), 2, 1, 1)]
)
def test_two_convolutions_and_a_gelu(grid: tuple[int, int], before: int, after: int, kernel: int) -> None:
    call, params, hidden = _image(grid, before, after, kernel)
    leaves = [hidden, *params.values()]
    for x in leaves:
        x.requires_grad_(True)
    found, wanted = FFNifiedAttention(kernel).mix(hidden, call), _by_hand(hidden, params, grid, before)
    assert close(found, wanted)
    losses = [(x - 1).square().mean() for x in (found, wanted)]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_an_image_model_is_served_and_learns() -> None:
    learns_of_an_image(FFNifiedAttention.example())


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=400)
    before = torch.get_rng_state()
    found, again = (FFNifiedAttention(3).parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "query": (400, 400), "query_bias": (400,), "key": (400, 1, 3, 3), "key_bias": (400,),
        "value": (400, 1, 3, 3), "value_bias": (400,),
    }  # fmt: skip
    other = FFNifiedAttention(3).parameters(replace(layer, number=0))
    for name, x in found.items():
        most = 1 / 20 if "query" in name else 1 / 3
        assert torch.equal(x, again[name])
        assert not torch.equal(x, other[name])
        assert 0.95 * most < float(x.max()) <= most
        assert -most <= float(x.min()) < -0.95 * most
    assert not torch.equal(found["key"], found["value"])


def test_causal_models_are_told_from_images() -> None:
    model = models.tiny("llama")
    roles = {"patches": Region(((0, 12),), (3, 4))}
    with (
        pytest.raises(SiteError, match="layer 0: acts on rows and columns of patches that all see one another"),
        attach(model, FFNifiedAttention(3), roles=roles) as run,
    ):
        run(**models.tiny_inputs(model, length=12))


def test_what_cannot_be() -> None:
    call, _, hidden = _image((3, 4), 1, 0, 3)
    with pytest.raises(SiteError, match="layer 0: acts on rows and columns of patches that all see one another"):
        FFNifiedAttention(3).mix(hidden, replace(call, mask=Mask((Causal(),))))
    assert FFNifiedAttention().kernel == 7
    assert FFNifiedAttention.example() == FFNifiedAttention(3)
    for kernel in (0, -1, 4):
        with pytest.raises(FieldError, match=rf"kernel = {kernel}: must be odd, and 1 or more; .*7"):
            FFNifiedAttention(kernel)
