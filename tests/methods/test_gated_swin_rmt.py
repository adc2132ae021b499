"""GatedSwinRMT against rows, columns and a convolution in loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import Causal, Layer, Mask
from heedful.conformance.bare import Bare, Shape, parameters
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.errors import FieldError, SiteError
from heedful.core.regions import Region
from heedful.methods import GatedSwinRMT
from tests.images_by_hand import convolved, learns_of_an_image

HEADS, D, E = 4, 3, 6
Lines = dict[tuple[int, int], Tensor]


def _set_up(method: GatedSwinRMT, grid: tuple[int, int], before: int, after: int) -> tuple[Call, list[Tensor]]:
    n, draw = before + math.prod(grid) + after, torch.Generator().manual_seed(1)
    bare = Bare(Shape(b=2, h=HEADS, g=2, q=n, k=n, d=D, dv=D, e=E), dtype=torch.float64, rules=())
    given = parameters(method, bare.shape.layer, torch.float64)
    params = {name: x + torch.randn(x.shape, generator=draw).double() / 4 for name, x in given.items()}
    call = replace(bare.call, roles={"patches": Region(((before, n - after),), grid)}, mask=Mask(), params=params)
    return call, [bare.q, bare.k, bare.v, bare.hidden]


def _along(q: Lines, k: Lines, v: Lines, axis: int, head: int, method: GatedSwinRMT, scale: float) -> Lines:
    decay = 1 - 2 ** -(method.start + method.span * head / HEADS)
    found = {}
    for at in q:
        line = [other for other in q if other[1 - axis] == at[1 - axis]]
        window = (at[axis] + method.window - method.shift) // method.window
        seen = [x for x in line if (x[axis] + method.window - method.shift) // method.window == window]
        weights = torch.stack([(q[at] @ k[x] * scale).exp() * decay ** abs(at[axis] - x[axis]) for x in seen])
        found[at] = sum(w * v[x] for w, x in zip(weights / weights.sum(), seen, strict=True))
    return found


@pytest.mark.parametrize(
    ("grid", "before", "after", "method"),
    [
        ((3, 4), 1, 0, GatedSwinRMT(2, kernel=3)),
        ((4, 3), 0, 2, GatedSwinRMT(3, 1, 1.0, 2.0, 1)),
        ((2, 3), 2, 1, GatedSwinRMT(7, 6, 3.0, 0.0, 5)),
    ],
)
def test_rows_then_columns_and_a_gate(grid: tuple[int, int], before: int, after: int, method: GatedSwinRMT) -> None:
    call, given = _set_up(method, grid, before, after)
    leaves = [x.requires_grad_() for x in (*given, *call.params.values())]
    q, k, v, hidden = given
    found = method.retain((q, k, v), replace(call, hidden=hidden))
    wanted = torch.zeros_like(q)
    places = [divmod(i, grid[1]) for i in range(math.prod(grid))]
    p = call.params
    for b in range(2):
        image = {at: torch.cat([v[b, h // 2, before + i] for h in range(HEADS)]) for i, at in enumerate(places)}
        near = convolved(image, p["near"], p["near_bias"])
        for h in range(HEADS):
            lines = [{at: x[before + i] for i, at in enumerate(places)} for x in (q[b, h], k[b, h // 2], v[b, h // 2])]
            across = _along(*lines, 1, h, method, call.scale)
            down = _along(lines[0], lines[1], across, 0, h, method, call.scale)
            for i, at in enumerate(places):
                part = slice(h * D, (h + 1) * D)
                gate = 1 / (1 + torch.exp(-(p["gate"][part] @ hidden[b, before + i] + p["gate_bias"][part])))
                wanted[b, h, before + i] = gate * (down[at] + near[at][part])
    assert close(found, wanted)
    losses = [(x - 1).square().mean() for x in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_an_image_model_is_served_and_learns() -> None:
    learns_of_an_image(GatedSwinRMT.example())


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=20)
    before = torch.get_rng_state()
    found, again = (GatedSwinRMT().parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "near": (24, 1, 5, 5), "near_bias": (24,), "gate": (24, 20), "gate_bias": (24,),
    }  # fmt: skip
    other = GatedSwinRMT().parameters(replace(layer, number=0))
    for name, x in found.items():
        assert torch.equal(x, again[name])
        assert not torch.equal(x, other[name])


def test_what_cannot_be() -> None:
    assert GatedSwinRMT() == GatedSwinRMT(7, 0, 2.0, 4.0, 5)
    assert GatedSwinRMT.example() == GatedSwinRMT(3, 1, kernel=3)
    assert GatedSwinRMT(1, 0, 0.1, 0.0, 1).window == 1
    with pytest.raises(FieldError, match=r"window = 0: must be 1 or more; .*7"):
        GatedSwinRMT(0)
    for shift in (-1, 7):
        with pytest.raises(FieldError, match=rf"shift = {shift}: must be 0 or more, and less than the window; .*3"):
            GatedSwinRMT(7, shift)
    for name, value, good in (
        ("start", 0.0, 2.0),
        ("start", math.inf, 2.0),
        ("span", -1.0, 4.0),
        ("span", math.inf, 4.0),
    ):
        with pytest.raises(FieldError, match=rf"{name} = {value}: .*{good}"):
            GatedSwinRMT(**{name: value})
    for kernel in (0, -1, 4):
        with pytest.raises(FieldError, match=rf"kernel = {kernel}: must be odd, and 1 or more; .*5"):
            GatedSwinRMT(kernel=kernel)
    call, (q, k, v, _) = _set_up(GatedSwinRMT(2), (2, 3), 1, 0)
    assert not GatedSwinRMT(2).idle(call)
    assert GatedSwinRMT(2).idle(replace(call, mask=Mask((Causal(),))))
    with pytest.raises(SiteError, match="layer 0: the layer's input is not known, and the gate needs it"):
        GatedSwinRMT(2).retain((q, k, v), replace(call, hidden=None))
