"""IFAM against parts in loops, a vision transformer that begins anew, and patches that must not matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import Run, attach, models
from heedful.authoring import Causal, FieldError, Layer, Mask
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.state import State
from heedful.methods import IFAM
from heedful.methods.mechanisms.routed._parts import shaping
from tests.images_by_hand import image_call, normed_by_hand


def _tiny(seed: int = 0, layers: int = 3) -> Any:
    return models.tiny("vit", image_size=16, num_hidden_layers=layers, seed=seed)


def _moved(run: Run, seed: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    named = dict(zip((name.split(".")[-1] for name in run.state_dict()), run.parameters(), strict=True))
    with torch.no_grad():
        for p in named.values():
            p += torch.randn(p.shape, generator=draw) / 2
    return named


def _chosen(x: Tensor, p: dict[str, Tensor]) -> tuple[list[bool], list[Tensor]]:
    """Which patches `[n e]` are of a part in use, and how surely each is."""
    seen, sure = [], []
    noise = torch.empty(len(x), len(p["parts"])).exponential_(generator=torch.Generator().manual_seed(0)).to(x)
    for patch, lower in zip(x, noise.log(), strict=True):
        patch = normed_by_hand(patch, p, "norm")
        apart = torch.stack([((patch - part) ** 2).sum() for part in p["parts"]]) + lower
        shares = torch.exp(apart.min() - apart) / torch.exp(apart.min() - apart).sum()
        seen.append(bool(shares[:-1].max() >= shares[-1]))
        sure.append(shares[:-1].sum())
    return seen, sure


def test_which_patches_are_of_a_part() -> None:
    method = IFAM(1, 3)
    call, x = image_call(method, (3, 4), 1, 0, 5)
    call = replace(call, training=False)
    params = dict(call.params)
    for leaf in (x, *params.values()):
        leaf.requires_grad_(True)
    found = method.seen(x, call)
    by_hand = [_chosen(image, params) for image in x]
    want = torch.tensor([seen for seen, _ in by_hand])
    assert want.any()
    assert not want.all()
    assert torch.equal(found.detach(), want.double())
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(5)).double()
    leaves = [x, *params.values()]
    sure = torch.stack([torch.stack(sure) for _, sure in by_hand])
    one, other = (torch.autograd.grad((weights * y).sum(), leaves) for y in (found, sure))
    for a, b in zip(one, other, strict=True):
        assert bool(b.any())
        assert close(a, b, 512)


def test_parts_are_drawn_in_training() -> None:
    method = IFAM(1, 3, 0.0)
    call, x = image_call(method, (20, 30), 1, 0, 5)
    call = replace(call, training=True, params={n: p.detach() for n, p in call.params.items()})
    with torch.no_grad():
        before = torch.get_rng_state()
        first, again, second = (method.seen(x, replace(call, forward=n)) for n in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
        drawn = torch.stack([method.seen(x, replace(call, forward=n)) for n in range(300)])
        near = torch.stack(
            [
                torch.stack(
                    [-((normed_by_hand(patch, dict(call.params), "norm") - a) ** 2).sum() for a in call.params["parts"]]
                )
                for patch in x[0, :40]
            ]
        )
        ground = near.softmax(-1)[:, -1]  # what Gumbel's noise makes of a softmax
        assert float(((1 - drawn[:, 0, :40].mean(0)) - ground).abs().max()) < 0.12
        alone = IFAM(1, 1, 0.5)
        call, x = image_call(alone, (2, 2), 1, 0, 5)
        apart = torch.tensor([[0.0] * 5, [3.5, 0.0, 0.0, 0.0, 0.0]]).double()  # the ground is hardly ever nearer
        sure = {"parts": apart, "norm": torch.zeros(5).double(), "norm_bias": torch.zeros(5).double()}
        call = replace(call, training=True, params=sure)
        share = torch.stack([alone.seen(x, replace(call, forward=n)) for n in range(400)])
        assert torch.equal(share.amin(2), share.amax(2))  # a part is left out in all of an image
        assert 0.4 < float(share.mean()) < 0.6


def test_later_layers_begin_anew_and_see_chosen_patches() -> None:
    model = _tiny()
    inputs = models.tiny_inputs(model)
    with attach(model, IFAM(1, 2)) as run:
        p = _moved(run)
        found = run(**inputs).logits
        vit = model.vit
        image = vit.embeddings(inputs["pixel_values"])
        seen = [_chosen(x[1:], p)[0] for x in _layer(vit.layers[0], image, None)]
        keep = torch.tensor([[True, *row] for row in seen])
        assert not keep.all()
        assert keep[:, 1:].any()
    x = image
    for layer in vit.layers[1:]:
        x = _layer(layer, x, keep)
    assert close_model(found, model.classifier(vit.layernorm(x)[:, 0]))


def _layer(layer: Any, x: Tensor, keep: Tensor | None, gate: Tensor | None = None) -> Tensor:
    part, y = layer.attention, layer.layernorm_before(x)
    q, k, v = (f(y).unflatten(-1, (4, -1)).transpose(1, 2) for f in (part.q_proj, part.k_proj, part.v_proj))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
    v = v if gate is None else v * gate[:, None, :, None]
    x = x + part.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.layernorm_after(x))


class _Given(IFAM):
    """Every other patch is chosen."""

    def seen(self, x: Tensor, call: Call) -> Tensor:
        return torch.ones_like(x[..., 0]) * (torch.arange(x.shape[1]) % 2 == 0)


def test_nothing_that_is_not_chosen_matters() -> None:
    model = _tiny()
    pixels = models.tiny_inputs(model)["pixel_values"]
    other = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(3))
    column = torch.arange(16) // 4
    hidden = (column % 2 == 1).expand(pixels.shape)  # of four patches a row, so these are odd ones
    with attach(model, _Given(1, 2)) as run:
        logits = [run(pixel_values=x).logits for x in (pixels, torch.where(hidden, other, pixels))]
        assert torch.equal(*logits)
        assert not torch.equal(logits[0], run(pixel_values=torch.where(hidden, pixels, other)).logits)


def test_a_loss_reaches_parts_by_the_values_of_what_is_seen() -> None:
    model = _tiny()
    inputs = models.tiny_inputs(model)
    with attach(model, IFAM(1, 2)) as run:
        p = _moved(run)
        run(**inputs).logits[:, 0].sum().backward()
        found = [p[name].grad for name in ("parts", "norm", "norm_bias")]
        image, vit = model.vit.embeddings(inputs["pixel_values"]), model.vit
        by_hand = [_chosen(x[1:], p) for x in _layer(vit.layers[0], image, None)]
    keep = torch.tensor([[True, *seen] for seen, _ in by_hand])
    sure = torch.stack([torch.stack(each) for _, each in by_hand])
    gate = torch.cat([torch.ones(len(sure), 1), 1 + sure - sure.detach()], 1)
    x = image
    for layer in vit.layers[1:]:
        x = _layer(layer, x, keep, gate)
    want = torch.autograd.grad(model.classifier(vit.layernorm(x)[:, 0])[:, 0].sum(), [*p.values()], allow_unused=True)
    for one, (name, other) in zip(found, zip(p, want, strict=True), strict=True):
        assert name in ("parts", "norm", "norm_bias")
        assert one is not None
        assert other is not None
        assert bool(other.any())
        assert close_model(one, other)


def _maps(images: int = 3, rows: int = 4, cols: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(6)
    return (3 * torch.randn(images, 4, rows, cols, generator=draw, dtype=torch.float64)).softmax(1)


def _averaged(maps: Tensor) -> dict[tuple[int, int, int, int], Tensor]:
    """By image, part, row and column of the middle of nine places."""
    images, parts, rows, cols = maps.shape
    return {
        (b, p, y, x): sum((maps[b, p, y + j, x + i] for j in (-1, 0, 1) for i in (-1, 0, 1)), torch.zeros(())) / 9
        for b in range(images)
        for p in range(parts)
        for y in range(1, rows - 1)
        for x in range(1, cols - 1)
    }


def _shaping(maps: Tensor) -> Tensor:
    images, parts, rows, cols = maps.shape
    near = _averaged(maps)
    absent = [1 - max(v for (_, p, _, _), v in near.items() if p == part) for part in range(parts - 1)]
    far = {
        (y, x): (2 * (y - 1) / (rows - 3) - 1) ** 2 + (2 * (x - 1) / (cols - 3) - 1) ** 2
        for y in range(1, rows - 1)
        for x in range(1, cols - 1)
    }
    lost = [
        -torch.log(max(near[b, parts - 1, y, x] * out / max(far.values()) for (y, x), out in far.items()))
        for b in range(images)
    ]
    ragged, doubt = torch.zeros(()), torch.zeros(())
    for b in range(images):
        for y in range(rows):
            for x in range(cols):
                for p in range(parts):
                    here = maps[b, p, y, x]
                    ragged = ragged + ((maps[b, p, y + 1, x] - here).abs() if y + 1 < rows else 0)
                    ragged = ragged + ((maps[b, p, y, x + 1] - here).abs() if x + 1 < cols else 0)
                    doubt = doubt - here * torch.log(here)
    places = images * rows * cols
    return sum(absent) / len(absent) + 2 * sum(lost) / images + ragged / places + doubt / places  # type: ignore[return-value]


def test_what_shapes_parts() -> None:
    maps = _maps().requires_grad_()
    found, want = shaping(maps), _shaping(maps)
    assert close(found, want)
    one, other = (torch.autograd.grad(x, maps)[0] for x in (found, want))
    assert close(one, other, 64)
    sure = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    sure[:, 1] = 1
    assert float(shaping(torch.cat([sure, sure, sure[:, :, :1]], 2))) == pytest.approx(1.0), "no part, and no doubt"


def test_parts_are_shaped_in_training_from_maps_without_noise() -> None:
    method = IFAM(1, 3, shape=0.5)
    call, x = image_call(method, (4, 5), 1, 0, 5)
    for training, weight in ((True, 0.5), (False, None)):
        now = replace(call, depth=2, training=training, state=State())
        now.state.forward["image"] = x
        method.divide(x, now)
        found = method.form(x, now)
        if weight is None:
            assert found is None
            continue
        apart = torch.stack(
            [
                torch.stack(
                    [-((normed_by_hand(patch, dict(call.params), "norm") - a) ** 2).sum() for a in call.params["parts"]]
                )
                for image in x
                for patch in image[1:]
            ]
        )
        maps = apart.softmax(-1).view(2, 4, 5, 4).permute(0, 3, 1, 2)
        assert found is not None
        assert close(found, weight * _shaping(maps))
    small, y = image_call(method, (2, 5), 1, 0, 5)
    small.state.forward["image"] = y
    small = replace(small, depth=2, training=True)
    method.divide(y, small)
    assert method.form(y, small) is None, "too small for nine places"


def test_where_nothing_is_chosen_softmax_stays() -> None:
    method = IFAM(1, 2)
    call, _ = image_call(method, (2, 2), 1, 0, 5)
    assert not method.idle(call)
    assert method.idle(replace(call, mask=Mask((Causal(),))))
    assert method.idle(replace(call, roles={}))
    for rows, rests in ((slice(1, 5), False), (slice(2, 5), True), (slice(0, 4), True)):
        part = replace(call, queries=call.queries.take(rows), keys=call.keys.take(rows))
        assert method.idle(part) == rests
    assert method.parameters(replace(Layer(0, 4, 4, 8, 8, 32), number=1)) == {}


def test_what_it_starts_with() -> None:
    layer = Layer(1, 4, 4, 8, 8, 32)
    before = torch.get_rng_state()
    found = IFAM(2, 100).parameters(layer)
    assert torch.equal(before, torch.get_rng_state())
    assert found["parts"].shape == (101, 32)
    assert 0.97 * 32**-0.5 < float(found["parts"].abs().max()) <= 32**-0.5
    assert torch.equal(found["parts"], IFAM(2, 100).parameters(layer)["parts"])
    assert not torch.equal(found["parts"], IFAM(1, 100).parameters(replace(layer, number=0))["parts"])
    assert torch.equal(found["norm"], torch.ones(32))
    assert torch.equal(found["norm_bias"], torch.zeros(32))


def test_what_cannot_be() -> None:
    assert IFAM() == IFAM(6, 8, 0.3, 1.0)
    assert IFAM.example() == IFAM(1, 2, 0.3, 1.0)
    assert IFAM(1, 1, 0.0).stage == 1
    with pytest.raises(FieldError, match=r"stage = 0: must be 1 or more; .*6"):
        IFAM(0)
    with pytest.raises(FieldError, match=r"parts = 0: must be 1 or more; .*8"):
        IFAM(parts=0)
    for drop in (-0.1, 1.0):
        with pytest.raises(FieldError, match=rf"drop = {drop}: must be 0 or more, and below 1; .*0.3"):
            IFAM(drop=drop)
    for shape in (-0.1, float("inf")):
        with pytest.raises(FieldError, match=rf"shape = {shape}: must be 0 or more.*1.0"):
            IFAM(shape=shape)
    model = _tiny(layers=2)
    with (
        pytest.raises(FieldError, match=r"stage = 2: must leave the second stage some of the 2 layers; .*1"),
        attach(model, IFAM(2, 2)) as run,
    ):
        run(**models.tiny_inputs(model))
