"""Bi-level routing attention: regions, routes, what patches see and the convolution of values, against loops."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from heedful import attach, models, native
from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape, parameters
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Causal, Mask
from heedful.core.positions import Positions
from heedful.core.regions import Region
from heedful.engine.backends import tiled
from heedful.methods import BiLevelRoutingAttention
from heedful.nn import Attention

needs_kernel = pytest.mark.skipif(isinstance(native.library(), str), reason=str(native.library()))
GRIDS = [((4, 6), 2, 1, 0), ((4, 6), 2, 0, 2), ((6, 3), 3, 2, 1), ((3, 3), 3, 0, 0), ((2, 4), 1, 1, 1)]


def _bare(grid: tuple[int, int], before: int, after: int, **shape: int) -> Bare:
    n = before + math.prod(grid) + after
    bare = Bare(Shape(q=n, k=n, dv=6, **shape), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, roles={"patches": Region(((before, n - after),), grid)}, mask=Mask())
    return bare


def _params(bare: Bare, kernel: int) -> dict[str, Tensor]:
    return parameters(BiLevelRoutingAttention(1, 1, kernel), bare.shape.layer, torch.float64)


def _softmax(q: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
    weights = torch.stack([(q * x).sum() / math.sqrt(len(q)) for x in k]).softmax(0)
    return sum(w * x for w, x in zip(weights, v, strict=True))  # type: ignore[return-value]


def _by_loops(bare: Bare, p: dict[str, Tensor], grid: tuple[int, int], before: int, regions: int, keep: int) -> Tensor:
    s, (rows, cols) = bare.shape, grid
    high, wide, half = rows // regions, cols // regions, p["kernel"].shape[-1] // 2
    place = {(y, x): before + y * cols + x for y in range(rows) for x in range(cols)}
    of = {place[y, x]: (y // high, x // wide) for y, x in place}
    names = sorted(set(of.values()))
    others = [i for i in range(s.q) if i not in of]
    out = torch.zeros(s.b, s.h, s.q, s.dv, dtype=torch.float64)
    for b in range(s.b):
        key = bare.k[b].repeat_interleave(s.h // s.g, 0)
        value = bare.v[b].repeat_interleave(s.h // s.g, 0)

        def mean(x: Tensor, name: tuple[int, int]) -> Tensor:
            mine = [i for i in of if of[i] == name]
            return sum(x[:, i] for i in mine) / len(mine)  # type: ignore[return-value]

        for name in names:
            suits = {other: float((mean(bare.q[b], name) * mean(key, other)).sum().detach()) for other in names}
            chosen = sorted(names, key=lambda other, suits=suits: -suits[other])[:keep]
            seen = [i for i in of if of[i] in chosen] + others
            for i in [i for i in of if of[i] == name]:
                for h in range(s.h):
                    out[b, h, i] = _softmax(bare.q[b, h, i], [key[h, j] for j in seen], [value[h, j] for j in seen])
        for i in others:
            for h in range(s.h):
                out[b, h, i] = _softmax(bare.q[b, h, i], list(key[h]), list(value[h]))
        for (y, x), i in place.items():
            out[b, :, i] += p["bias"]
            for dy in range(-half, half + 1):
                for dx in range(-half, half + 1):
                    if (near := place.get((y + dy, x + dx))) is not None:
                        out[b, :, i] += p["kernel"][:, :, half + dy, half + dx] * value[:, near]
    return out


@pytest.mark.parametrize("keep", [1, 2, 20])
@pytest.mark.parametrize(("grid", "regions", "before", "after"), GRIDS)
def test_regions_choose_regions_and_their_patches_meet(
    grid: tuple[int, int], regions: int, before: int, after: int, keep: int
) -> None:
    bare = _bare(grid, before, after)
    params = _params(bare, 3)
    found, _ = bare.run(BiLevelRoutingAttention(regions, keep, 3), "reference", params=params)
    assert close(found, _by_loops(bare, params, grid, before, regions, keep))


def test_all_regions_and_no_convolution_are_softmax() -> None:
    bare = _bare((4, 4), 1, 0, g=4)
    params = {name: torch.zeros_like(x) for name, x in _params(bare, 5).items()}
    found, _ = bare.run(BiLevelRoutingAttention(2, 4), "reference", params=params)
    assert close(found, (bare.q @ bare.k.mT / math.sqrt(8)).softmax(-1) @ bare.v)


def test_the_first_steps_loss_and_gradient_are_those_of_the_loops() -> None:
    grid = (4, 4)
    bare = _bare(grid, 1, 0)
    params = _params(bare, 3)
    leaves = [*params.values(), bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    heads = bare.run(BiLevelRoutingAttention(2, 2, 3), "reference", params=params)[0]
    losses = [(x - 1).square().mean() for x in (heads, _by_loops(bare, params, grid, 1, 2, 2))]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


@pytest.mark.parametrize("backend", ["tiled", pytest.param("native", marks=needs_kernel)])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 1)])
def test_regions_are_gathered_with_what_they_see(
    before: int, after: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = _bare((8, 8), before, after)
    bare.q, bare.k, bare.v = (x.float() for x in (bare.q, bare.k, bare.v))
    params = {name: x.float() for name, x in _params(bare, 3).items()}
    leaves = [x.requires_grad_(True) for x in (*params.values(), bare.q, bare.k, bare.v)]
    monkeypatch.setattr(tiled, "in_parts", seen := Mock(wraps=tiled.in_parts))

    def told(backend: str, keep: int) -> list[Tensor]:
        heads = bare.run(BiLevelRoutingAttention(4, keep, 3), backend, params=params)[0]
        waves = torch.arange(heads.numel(), dtype=heads.dtype).view_as(heads).sin()
        return [heads, *torch.autograd.grad((heads * waves).sum(), leaves)]

    for keep, gathered in ((2, True), (9, False)):
        assert all(close(*both) for both in zip(told(backend, keep), told("reference", keep), strict=True))
        assert seen.called == gathered
        seen.reset_mock()


def test_of_another_call_no_part_is_made() -> None:
    bare = _bare((4, 4), 1, 1)
    method, call = BiLevelRoutingAttention(2, 1), replace(bare.call, query=bare.q, key=bare.k, value=bare.v)
    mine, others = method.route(call.mask, call).rules[0].parts()
    assert (mine.rows.shape, mine.cols.shape) == ((1, 1, 4, 4), (bare.shape.b, 1, 4, 6))
    assert (others.rows.tolist(), others.cols.tolist()) == ([[[[0, 17]]]], [[[list(range(18))]]])
    assert mine.keep is None
    assert others.keep is None
    with pytest.raises(SiteError, match="regions choose by queries and keys"):
        method.route(bare.call.mask, replace(bare.call, query=None))
    with pytest.raises(SiteError, match="values are convolved"):
        method.convolve(bare.q, replace(bare.call, value=None))


def test_an_image_model_is_served_and_learns() -> None:
    model = models.tiny("vit", image_size=16)
    inputs = models.tiny_inputs(model)
    with attach(model, BiLevelRoutingAttention(2, 1, 3)) as run:
        assert run.difference(**inputs) > 0
        run(**inputs, output_hidden_states=True).hidden_states[-1].square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in run.parameters())


def test_where_softmax_stays() -> None:
    method, call = BiLevelRoutingAttention(2, 1), _bare((2, 2), 1, 1).call
    assert not method.idle(call)
    line = {"patches": Region(((1, 5),), (4,))}
    bare = {"patches": ((1, 5),)}
    for change in (
        {"cross": True}, {"mask": Mask((Causal(),))}, {"roles": {}}, {"roles": bare}, {"roles": line},
        {"queries": Positions.row(5, 1)},
    ):  # fmt: skip
        assert method.idle(replace(call, **change)), change


def test_regions_that_do_not_fit_are_refused() -> None:
    bare = _bare((4, 6), 0, 0)
    params = _params(bare, 5)
    for regions in (3, 4, 7):
        rule = rf"regions = {regions}: must divide both sides of the 4 x 6 patches of layer 0; .*2"
        with pytest.raises(FieldError, match=rule):
            bare.run(BiLevelRoutingAttention(regions), "reference", params=params)


def test_the_start() -> None:
    layer = Layer(0, 4, 4, 8, 300, 32)
    found, again = (BiLevelRoutingAttention(kernel=3).parameters(layer) for _ in range(2))
    other = BiLevelRoutingAttention(kernel=3).parameters(replace(layer, number=1))
    assert {name: x.shape for name, x in found.items()} == {"kernel": (4, 300, 3, 3), "bias": (4, 300)}
    for name, x in found.items():
        assert torch.equal(x, again[name])
        assert not torch.equal(x, other[name])
        assert 0.32 < float(x.max()) <= 1 / 3
        assert -1 / 3 <= float(x.min()) < -0.32


@pytest.mark.parametrize(("field", "value"), [("regions", 0), ("keep", 0), ("kernel", 0), ("kernel", 4)])
def test_wrong_fields_are_refused(field: str, value: int) -> None:
    with pytest.raises(FieldError, match=rf"BiLevelRoutingAttention\.{field} = {value}"):
        BiLevelRoutingAttention(**{field: value})
    assert BiLevelRoutingAttention() == BiLevelRoutingAttention(7, 4, 5)


def test_patches_that_are_not_there_are_missed() -> None:
    mine = Attention(8, 2, BiLevelRoutingAttention.example(), batch_first=True)
    mine.run.roles = {"patches": Region(((3, 19),), (4, 4))}
    with pytest.raises(SiteError, match=r"14 of the 4 x 4 patches are among the tokens"):
        mine(*(torch.randn(1, 17, 8),) * 3)
