"""Hepos: which places of the source each head sees, and that heads see all of them together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heedful import attach, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.mask import Mask, Padding
from heedful.methods import Hepos

CROSS = ("model.decoder.layers.0.encoder_attn", "model.decoder.layers.1.encoder_attn")


def _bare(q: int, k: int, text: torch.Tensor | None = None) -> Bare:
    bare = Bare(Shape(q=q, k=k), dtype=torch.float64, rules=() if text is None else (Padding(text),))
    bare.call = replace(bare.call, cross=True)
    return bare


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_a_head_sees_every_so_many_places_from_its_own_number_on(stride: int, backend: str) -> None:
    text = torch.ones(2, 11, dtype=torch.bool)
    text[1, 7:] = False
    bare = _bare(5, 11, text)
    found, _ = bare.run(Hepos(stride), backend)
    for b in range(2):
        for h in range(4):
            places = [j for j in range(11) if text[b, j] and (j - h) % stride == 0]
            k, v = bare.k[b, h // 2, places], bare.v[b, h // 2, places]
            assert close(found[b, h], (bare.q[b, h] @ k.T / 8**0.5).softmax(-1) @ v)


def test_heads_see_all_of_a_source_together_and_each_place_once() -> None:
    bare = _bare(1, 10)
    mask = Hepos(4).share(Mask(), bare.call)
    keep = mask.keeps(bare.call.tile(slice(0, 1), slice(0, 10)).pairs)
    assert keep is not None
    assert torch.equal(keep[0, :, 0].sum(0), torch.ones(10, dtype=torch.long))
    assert keep[0, :, 0].sum(1).tolist() == [3, 3, 2, 2]
    assert mask.rules[-1].scattered, "no kernel looks for stretches of keys"


def test_a_head_that_sees_no_place_gives_zeros() -> None:
    found, _ = _bare(3, 2).run(Hepos(4), "reference")
    assert bool(found[:, :2].all())
    assert not bool(found[:, 2:].any())


def test_it_acts_in_cross_attention_alone_and_halves_its_pairs() -> None:
    model = models.tiny("bart")
    ids = torch.arange(3, 19)[None]
    with attach(model, Hepos(2)) as run, torch.no_grad():
        run(input_ids=ids, decoder_input_ids=ids[:, :5])
        cross = {run.layer_names.index(name) for name in CROSS}
        density = run.activity().density
    assert all(density[i] == 0.5 for i in cross)
    assert Hepos().idle(_bare(1, 3).call) is False
    assert Hepos().idle(Bare().call)
    assert Hepos(1).idle(_bare(1, 3).call)


def test_strides_that_no_layer_can_share_are_refused() -> None:
    with pytest.raises(FieldError, match=r"Hepos.stride = 0: must be 1 or more"):
        Hepos(0)
    with pytest.raises(FieldError, match=r"Hepos.stride = 5: must be at most the layer's 4 heads"):
        Hepos(5).share(Mask(), _bare(1, 3).call)
