"""MoSA: which tokens heads choose and what they get, against loops over heads and tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Mask
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods import MoSA

TEXT = torch.ones(2, 19, dtype=torch.bool)
TEXT[0, :6] = False


def _bare(text: Tensor | None = None) -> tuple[Bare, dict[str, Tensor]]:
    router = torch.randn(4, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Bare(dtype=torch.float64, text=text), {"router": router}


def _by_hand(bare: Bare, router: Tensor, sparsity: int, text: Tensor, causal: bool = True) -> Tensor:
    out = torch.zeros_like(bare.q)
    for b in range(2):
        tokens = [i for i in range(bare.shape.k) if text[b, i]]
        count = min(max(len(tokens) // sparsity, 2), len(tokens))
        for h in range(4):
            wants = {i: 1 / (1 + (-(router[h] @ bare.hidden[b, i])).exp()) for i in tokens}
            chosen = sorted(tokens, key=lambda i, wants=wants: -float(wants[i].detach()))[:count]
            for i in chosen:
                seen = [j for j in chosen if j <= i or not causal]
                scores = torch.stack([bare.q[b, h, i] @ bare.k[b, h // 2, j] for j in seen]) / math.sqrt(8)
                out[b, h, i] = wants[i] * (scores.softmax(0) @ bare.v[b, h // 2, seen])
    return out


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("sparsity", [1, 3, 7, 50])
@pytest.mark.parametrize("padded", [False, True])
def test_heads_choose_tokens_which_see_those_chosen_before_them(padded: bool, sparsity: int, backend: str) -> None:
    text = TEXT if padded else torch.ones_like(TEXT)
    bare, params = _bare(TEXT if padded else None)
    found, _ = bare.run(MoSA(sparsity), backend, 5 if backend == "tiled" else None, params)
    assert close(found, _by_hand(bare, params["router"], sparsity, text))


def test_images_see_all_that_was_chosen() -> None:
    bare, params = _bare()
    bare.call = replace(bare.call, mask=Mask())
    found, _ = bare.run(MoSA(3), "reference", params=params)
    assert close(found, _by_hand(bare, params["router"], 3, torch.ones_like(TEXT), causal=False))


def test_the_first_steps_loss_and_gradient() -> None:
    bare, params = _bare(TEXT)
    leaves = [params["router"], bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    wanted = _by_hand(bare, params["router"], 3, TEXT)
    losses = [(x - 1).pow(2).mean() for x in (bare.run(MoSA(3), "tiled", 5, params)[0], wanted)]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_all_tokens_and_an_even_router_are_half_of_softmax() -> None:
    bare, _ = _bare()
    found, _ = bare.run(MoSA(1), "reference", params={"router": torch.zeros(4, 24, dtype=torch.float64)})
    keep = torch.ones(19, 19).tril() == 0
    scores = (bare.q @ bare.k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(keep, -torch.inf)
    assert close(found, scores.softmax(-1) @ bare.v.repeat_interleave(2, 1) / 2)


def test_new_tokens_choose_among_all_so_far() -> None:
    """The last row of a text read at once, and read alone behind the others; also after a crop."""
    bare, params = _bare()
    whole = MoSA(3).choose(Mask(), replace(bare.call, params=params, state=State()))
    wanted = whole.keeps(bare.call.tile(slice(18, 19), slice(0, 19)).pairs)
    state = State()
    for first, stop in ((0, 17), (14, 18), (18, 19)):
        queries, keys = Positions.row(first, stop - first), Positions.row(0, stop)
        part = replace(bare.call, queries=queries, keys=keys, hidden=bare.hidden[:, first:stop])
        mask = MoSA(3).choose(Mask(), replace(part, params=params, state=state))
    assert wanted is not None
    assert bool(wanted.any())
    assert torch.equal(mask.keeps(part.tile(slice(0, 1), slice(0, 19)).pairs), wanted)


def test_tokens_that_were_read_without_it_are_never_chosen() -> None:
    _, params = _bare()
    short = Bare(Shape(q=6), dtype=torch.float64)
    mask = MoSA(3).choose(Mask(), replace(short.call, params=params, state=State()))
    keep = mask.keeps(short.call.tile(slice(0, 6), slice(0, 19)).pairs)
    assert keep is not None
    assert not bool(keep[..., :13].any())
    assert torch.equal(keep.any(-2).sum(-1), torch.full((2, 4), 2))


def test_it_generates_behind_a_cache() -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=13)["input_ids"]
    with attach(model, MoSA(4).on(heads=[1, 2, 3])) as run, torch.no_grad():
        found = run.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        assert found.shape[1] == ids.shape[1] + 4


def test_what_cannot_be_known_is_refused() -> None:
    bare, params = _bare()
    call = replace(bare.call, params=params, state=State())
    assert MoSA().idle(replace(call, cross=True))
    assert not MoSA().idle(call)
    with pytest.raises(SiteError, match="MoSA, layer 0: the block is not handed hidden states"):
        MoSA().weigh(bare.q, replace(call, hidden=None))
    with pytest.raises(FieldError, match=r"MoSA.sparsity = 0: must be 1 or more"):
        MoSA(0)


def test_the_start() -> None:
    layer = Layer(0, 4, 2, 8, 8, 400)
    router = MoSA().parameters(layer)["router"]
    assert router.shape == (4, 400)
    assert torch.equal(router, MoSA().parameters(layer)["router"])
    assert not torch.equal(router, MoSA().parameters(replace(layer, number=1))["router"])
    assert 0.049 < float(router.max()) <= 0.05
    assert -0.05 <= float(router.min()) < -0.049
