"""Patches that an encoder's layer chooses, seen alone by the layers behind it and by who reads on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.mask import Mask
from heedful.core.method import Method
from heedful.core.positions import Positions
from heedful.core.regions import Region
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.kit.picked import PickedPatches, best, seen, weights_of

KEPT = torch.tensor([[True, False, False, True] * 4, [False, True, True, True] * 4])


class _Some(PickedPatches):
    """The same patches, whatever an image shows."""

    def choose(self, weights: Tensor, call: Call) -> Tensor:
        return KEPT


class _Maps(Method):
    """Weights of every query, as the choosing layer has them."""

    start: int = 0

    @reads(Site.MASK)
    def look(self, mask: Mask, call: Call) -> Cat:
        return Cat.of("maps", weights_of(mask, call, slice(self.start, len(call.queries))))


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("vit", image_size=16, num_hidden_layers=3, attn_implementation="eager")


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_later_layers_are_those_of_the_kept_tokens_alone(model: Any) -> None:
    with heedful.attach(model, _Some(layer=1)) as run:
        found = run(pixel_values=images()).logits
    for row in range(2):
        x = model.vit(images()[row : row + 1], output_hidden_states=True).hidden_states[2]
        places = [0, *(1 + i for i in range(16) if KEPT[row, i])]
        last = (model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer)[2]
        x = last(x[:, places])
        x = x[0] if isinstance(x, tuple) else x
        assert close_model(found[row], model.classifier(model.vit.layernorm(x)[0, 0]))


@torch.no_grad()
def test_weights_are_the_models_own(model: Any) -> None:
    for start in (0, 5):
        with heedful.attach(model, _Maps(start)) as run:
            run(pixel_values=images())
        wanted = model(images(), output_attentions=True).attentions
        for layer, kept in run[_Maps(start)].items():
            assert close_model(kept.value[0], wanted[layer][:, :, start:])


def test_a_mask_counts() -> None:
    bare = Bare()
    q, k = bare.q, bare.k
    call = replace(bare.call, query=q, key=k)
    found = weights_of(call.mask, call, slice(3, 9))
    s = (q.double() @ call.spread(k).double().mT * call.scale)[:, :, 3:9]
    s = s.masked_fill(torch.ones(19, 19, dtype=torch.bool).triu(1)[3:9], -torch.inf)
    assert close(found, s.softmax(-1).float())
    assert (found[:, :, 0, 4:] == 0).all()


def test_key_heads_whose_keys_stand_apart_see_their_own() -> None:
    """As behind a cache that keeps other tokens in each head."""
    call = Bare().call
    place = torch.stack([torch.arange(19), torch.arange(19).flip(0)])[None]
    call = replace(call, keys=Positions(place, place), roles={"patches": Region(((2, 6),))})
    kept = torch.tensor([[True, False, True, False], [False, True, True, True]])
    found = seen(kept, call, "patches")
    assert found.shape == (2, 4, 1, 19)
    for text, head, k in itertools.product(range(2), range(4), range(19)):
        p = int(place[0, head // 2, k])
        assert bool(found[text, head, 0, k]) == (not 2 <= p < 6 or bool(kept[text, p - 2]))


def test_the_best_and_the_earlier_of_equals() -> None:
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert best(score, 2).tolist() == [[False, True, True, False], [True, True, False, False]]
    assert best(score, torch.tensor([[3], [1]])).tolist() == [[False, True, True, True], [True, False, False, False]]


def test_images_that_do_not_fit_are_refused(model: Any) -> None:
    for roles, match in (
        ({"patches": ((1, 9), (9, 17))}, "patches must be one span"),
        ({"patches": ((0, 17),)}, "must hold the 16 patches"),
    ):
        some = heedful.attach(model, _Some(layer=0), roles=roles)
        with pytest.raises(FieldError, match=match), torch.no_grad(), some as run:
            run(pixel_values=images())
    with pytest.raises(FieldError, match=r"_Some\.layer = -1"):
        _Some(layer=-1)
