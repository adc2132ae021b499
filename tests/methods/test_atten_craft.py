"""AttenCraft: masks and the loss in loops over places, the loss's gradient, and what a fit keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.regions import PerText, Region
from heedful.methods import AttenCraft
from heedful.methods.intervene.diffusion.atten_craft import _Concepts, parted

from .painter import PLACES, WORDS, Painter, inputs, maps

LAYERS = tuple(f"model.decoder.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "encoder_attn"))
SPANS = ((0, 2), (3, 4), (4, 6))


def normed(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(x - low) / (high - low) for x in values]


def ahead(words: Tensor, places: Tensor, spans: Any, threshold: float) -> list[list[int]]:
    """Of one picture's `[n k]` and `[n n]`: whose each place is."""
    n = len(places)
    flat = normed(places.flatten().tolist())
    near = torch.tensor(flat, dtype=torch.float64).view(n, n)
    near = near @ near @ near @ near
    near = torch.tensor(normed(near.flatten().tolist()), dtype=torch.float64).view(n, n)
    refined = []
    for start, stop in spans:
        mine = [sum(float(words[i, k]) for k in range(start, stop)) for i in range(n)]
        squared = normed([x**2 for x in mine])
        refined.append(normed([sum(float(near[i, j]) * squared[j] for j in range(n)) for i in range(n)]))
    return [
        [int(all(mine[i] - other[i] > threshold for other in refined if other is not mine)) for i in range(n)]
        for mine in refined
    ]


def divergence(p: Tensor, mask: list[int]) -> Tensor:
    """Jensen and Shannon's, of softmaxes over places, the map brought from 0 to 1 before."""
    p = (p - p.min()) / (p.max() - p.min())
    one, other = (x.exp() / x.exp().sum() for x in (p, torch.tensor(mask, dtype=p.dtype)))
    total = torch.zeros((), dtype=p.dtype)
    for a, b in zip(one, other, strict=True):
        m = (a + b) / 2
        total = total + (a * torch.log(a / m) + b * torch.log(b / m)) / 2
    return total


@pytest.mark.parametrize("threshold", [0.1, 0.0, 0.3])
def test_a_fit_finds_whose_each_place_is(threshold: float) -> None:
    model = models.tiny("bart", attn_implementation="eager").eval()
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids[:, :6], "decoder_input_ids": ids.flip(1)}
    found = fit(AttenCraft(0.5, threshold), model, [{**given, "roles": {"concepts": SPANS}}], only=LAYERS)
    assert found.masks is not None
    assert (found.weight, found.threshold) == (0.5, threshold)
    with torch.no_grad():
        out = model(**given, output_attentions=True)
    cross, own = (
        sum(x.double().mean(1) for x in seen) / len(seen) for seen in (out.cross_attentions, out.decoder_attentions)
    )
    wanted = torch.tensor([ahead(cross[b], own[b], SPANS, threshold) for b in range(2)])
    assert torch.equal(found.masks["masks"].long(), wanted)
    assert 0 < int(wanted.sum()) < wanted.numel() / 3 + 1


def test_maps_of_several_batches_are_averaged_and_texts_have_words_of_their_own() -> None:
    model = models.tiny("bart").eval()
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(2))
    roles = [{"concepts": ((0, 1), (2, 3))}, {"concepts": ((4, 5), (1, 2))}]
    given = [{"input_ids": x[:, :6], "decoder_input_ids": x} for x in (ids, ids.flip(1))]
    reader = _Concepts()
    with torch.no_grad(), attach(model, reader, roles=roles, only=LAYERS) as run:
        for one in given:
            run(**one)
        each = run[reader]
    found = fit(AttenCraft(), model, [{**one, "roles": roles[0]} for one in given], only=LAYERS)
    assert found.masks is not None
    mean = (each[0] + each[1]) / 2
    assert torch.equal(found.masks["masks"][0], parted(mean, 0.1)[0])
    assert close(mean.amax(), mean.amax().clamp(max=1.0))
    swapped = reader.refined(torch.rand(1, 2, 9), torch.rand(1, 9, 9))
    assert close(swapped.amin(-1), torch.zeros(1, 2))
    assert close(swapped.amax(-1), torch.ones(1, 2))


def test_the_loss_and_its_gradient() -> None:
    model, given = Painter(), inputs()
    masks = torch.rand(2, 3, PLACES, generator=torch.Generator().manual_seed(4)) > 0.6
    roles = [{"concepts": SPANS}, {"concepts": ((1, 3), (0, 1), (5, 6))}]
    x = given["x"].clone().requires_grad_()
    wanted = torch.zeros((), dtype=torch.float64)
    mean = sum(maps(model, x, given["context"])) / 2
    for b in range(2):
        for c, (start, stop) in enumerate(roles[b]["concepts"]):
            mine = sum(mean[b, :, k] for k in range(start, stop))
            wanted = wanted + 0.7 * divergence(mine, masks[b, c].int().tolist()) / 6
    (slope,) = torch.autograd.grad(wanted, x)
    method = AttenCraft(0.7, masks=Fitted({"masks": masks}))
    with attach(model, method, roles=roles, inputs=given) as run:
        other = given["x"].clone().requires_grad_()
        run(x=other, context=given["context"])
        assert close_model(run.loss(), wanted.float())
        (found,) = torch.autograd.grad(run.loss(), other)
    assert bool(slope.any())
    assert close_model(found.float(), slope.float())


def test_words_behind_padding_are_counted_from_the_texts_beginning() -> None:
    text = torch.arange(19)[None] >= torch.tensor([[0], [4]])
    call = replace(Bare(text=text).call, roles={"concepts": PerText((Region(((1, 3),)), Region(((1, 3),))))})
    weights = torch.rand(2, 7, 19, generator=torch.Generator().manual_seed(0))
    found = _Concepts().words(weights, call)
    assert close(found[0, 0], weights[0, :, 1] + weights[0, :, 2])
    assert close(found[1, 0], weights[1, :, 5] + weights[1, :, 6])


def test_places_go_to_who_is_ahead() -> None:
    given = torch.tensor([[[0.9, 0.5, 0.2, 0.3], [0.1, 0.45, 0.9, 0.3], [0.0, 0.0, 0.85, 1.0]]])
    assert parted(given, 0.1).int().tolist() == [[[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]]
    assert parted(given, 0.04).int().tolist() == [[[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]
    assert parted(given[:, :1], 0.25).int().tolist() == [[[1, 1, 0, 1]]]
    assert parted(torch.ones(1, 2, 3), 0.0).int().sum() == 0


def test_without_a_fit_and_what_cannot_be() -> None:
    assert AttenCraft() == AttenCraft(1.0, 0.1, "concepts", None, None)
    assert AttenCraft.neutral() == AttenCraft(0.0, seed=0)
    assert AttenCraft.example() == AttenCraft(role="marked", seed=0)
    for wrong in ({"weight": -0.1}, {"weight": math.inf}, {"threshold": -0.1}, {"threshold": 1.0}, {"role": ""}):
        with pytest.raises(FieldError, match=rf"AttenCraft\.{next(iter(wrong))} = "):
            AttenCraft(**wrong)  # type: ignore[arg-type]
    model, given, roles = Painter(), inputs(), {"concepts": SPANS}
    with attach(model, AttenCraft(seed=3), roles=roles, inputs=given) as run:
        run(**given)
        drawn = torch.rand(2, 3, PLACES, generator=torch.Generator().manual_seed(3)).round()
        mean = sum(maps(model, **given)) / 2
        wanted = sum(
            divergence(mean[b, :, slice(*SPANS[c])].sum(-1), drawn[b, c].int().tolist())
            for b in range(2)
            for c in range(3)
        )
        assert close_model(run.loss(), (wanted / 6).float())
    with (
        pytest.raises(FieldError, match=r"must be fitted with heedful.fit\(\) to the pictures, or seed be given"),
        attach(model, AttenCraft(), roles=roles, inputs=given) as run,
    ):
        run(**given)
    other = AttenCraft(masks=Fitted({"masks": torch.zeros(2, 2, PLACES, dtype=torch.bool)}))
    with (
        pytest.raises(FieldError, match=r"is of other pictures: \[b c n\] is \[2, 2, 12\], and here \[2, 3, 12\]"),
        attach(model, other, roles=roles, inputs=given) as run,
    ):
        run(**given)
    for batches in ([], [{"input_ids": torch.zeros(1, 3)}], [{"roles": {"others": SPANS}}]):
        with pytest.raises(FieldError, match=r"AttenCraft\.batches = [01]: must be 1 or more, each with roles"):
            fit(AttenCraft(), models.tiny("bart"), batches)
    ids = torch.arange(3, 15)[None]
    unlike = [{"input_ids": ids, "decoder_input_ids": ids[:, :n], "roles": {"concepts": SPANS}} for n in (9, 12)]
    with pytest.raises(FieldError, match=r"batches = .*: must be of the same pictures and concepts"):
        fit(AttenCraft(), models.tiny("bart"), unlike, only=LAYERS)
    assert WORDS == 6
