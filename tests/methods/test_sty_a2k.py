"""StyA2K against keys of regions, and a chosen region's patches, in loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import Causal, FieldError, Layer, Mask, Region, SiteError
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.methods import StyA2K
from heedful.nn import Attention
from tests.images_by_hand import learns_of_an_image

BEFORE = 1  # tokens before the patches; one comes after them
Place = tuple[int, int]


def _bare(grid: Place) -> Bare:
    n = BEFORE + grid[0] * grid[1] + 1
    bare = Bare(Shape(q=n, k=n, dv=6), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, roles={"patches": Region(((BEFORE, n - 1),), grid)})
    return bare


def _softmaxed(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    weights = [score.exp() for score in scores]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def _cells(grid: Place, region: int, token: Callable[[int], int]) -> list[list[int]]:
    """Tokens of each region, in the same order in each."""
    return [
        [token((top + i) * grid[1] + left + j) for i in range(region) for j in range(region)]
        for top in range(0, grid[0], region)
        for left in range(0, grid[1], region)
    ]


def _head(
    q: Tensor, k: Tensor, v: Tensor, cells: list[list[int]], scale: float, slope: Tensor, bias: Tensor
) -> dict[int, Tensor]:
    keys, values = [], []
    for cell in cells:
        mean_k, mean_v = sum(k[i] for i in cell) / len(cell), sum(v[i] for i in cell) / len(cell)
        like = [1 / (1 + torch.exp(-(bias + slope * (k[i] @ mean_k)))) for i in cell]
        keys.append((mean_k + sum(s * k[i] for s, i in zip(like, cell, strict=True))) / (len(cell) + 1))
        values.append((mean_v + sum(s * v[i] for s, i in zip(like, cell, strict=True))) / (len(cell) + 1))
    found = {}
    for cell in cells:
        suits = [float(sum(q[i] @ k[j] for i, j in zip(cell, other, strict=True)).detach()) for other in cells]
        best = cells[max(range(len(cells)), key=lambda at: suits[at])]
        for i in cell:
            spread = _softmaxed([scale * (q[i] @ key) for key in keys], values)
            found[i] = spread + _softmaxed([scale * (q[i] @ k[j]) for j in best], [v[j] for j in best])
    return found


@pytest.mark.parametrize(("grid", "region"), [((4, 6), 2), ((3, 2), 1), ((3, 6), 3), ((2, 2), 2)])
def test_regions_and_the_one_that_suits(grid: Place, region: int) -> None:
    bare = _bare(grid)
    params = {"slope": torch.tensor([0.7]).double(), "bias": torch.tensor([-0.3]).double()}
    leaves = [*params.values(), bare.q, bare.k, bare.v]
    for leaf in leaves:
        leaf.requires_grad_(True)
    found, _ = bare.run(StyA2K(region), "reference", None, params)
    k, v = bare.k.repeat_interleave(2, 1), bare.v.repeat_interleave(2, 1)
    scale = bare.q.shape[-1] ** -0.5
    rest = (bare.q @ k.mT * scale).softmax(-1) @ v
    cells = _cells(grid, region, lambda i: BEFORE + i)
    rows = []
    for b in range(len(bare.q)):
        for h in range(bare.q.shape[1]):
            at = _head(bare.q[b, h], k[b, h], v[b, h], cells, scale, params["slope"], params["bias"])
            rows.append(torch.stack([at.get(i, rest[b, h, i]) for i in range(bare.q.shape[2])]))
    want = torch.stack(rows).view_as(rest)
    assert close(found, want)
    losses = [x.square().sum() for x in (found, want)]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_content_looks_at_another_image() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2, StyA2K(2), batch_first=True).double()
    grid, n = (2, 4), 8
    attention.run.roles = {"patches": Region(((0, n),), grid)}
    content, style = torch.randn(2, 2, n, 8, dtype=torch.float64)
    found = attention(content, style, style, need_weights=False)[0]
    q, k, v = (
        part(x).unflatten(-1, (2, 4)).transpose(1, 2)
        for part, x in ((attention.q_proj, content), (attention.k_proj, style), (attention.v_proj, style))
    )
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    cells = _cells(grid, 2, lambda i: i)
    heads = [[_head(q[b, h], k[b, h], v[b, h], cells, 0.5, one, zero) for h in range(2)] for b in range(2)]
    want = torch.stack([torch.stack([torch.cat([by[i] for by in row]) for i in range(n)]) for row in heads])
    assert close(found, attention.out_proj(want))
    with pytest.raises(SiteError, match="layer 0: 6 of the 2 x 4 patches are among the keys, and all of them"):
        attention(content, style[:, :6], style[:, :6], need_weights=False)
    with pytest.raises(SiteError, match="layer 0: 7 of the 2 x 4 patches are among the tokens, and all of them"):
        attention(content[:, :7], style, style, need_weights=False)


def test_where_patches_lie_on_no_grid_softmax_stays() -> None:
    bare, method = _bare((2, 2)), StyA2K(2)
    assert not method.idle(bare.call)
    assert method.idle(replace(bare.call, mask=Mask((Causal(),))))
    assert method.idle(replace(bare.call, cross=True, in_order=True)), (
        "regions of a decoder's own tokens know of later ones"
    )
    for region in (None, Region(((1, 5),)), Region(((1, 5),), (2, 2, 1))):
        assert method.idle(replace(bare.call, roles={} if region is None else {"patches": region}))


def test_in_a_model_it_learns_what_is_alike() -> None:
    learns_of_an_image(StyA2K.example())


def test_what_cannot_be() -> None:
    assert StyA2K() == StyA2K(8)
    assert StyA2K.example() == StyA2K(2)
    found = StyA2K(1).parameters(Layer(0, 1, 1, 2, 2, 2))
    assert {name: x.tolist() for name, x in found.items()} == {"slope": [1.0], "bias": [0.0]}
    with pytest.raises(FieldError, match=r"region = 0: must be 1 or more; .*8"):
        StyA2K(0)
    with pytest.raises(FieldError, match=r"region = 3: must divide both sides of the 4 x 6 patches of layer 0"):
        _bare((4, 6)).run(StyA2K(3), "reference")
