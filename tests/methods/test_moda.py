"""MODA: keys of two kinds, each told in the space of the other, one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import FieldError, Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.mask import Causal, Padding
from heedful.core.state import State
from heedful.methods import MODA
from tests.by_hand import causal_map, heads_of, in_pieces, llama_states

N, SPAN = 9, (2, 5)
IMAGE = [SPAN[0] <= j < SPAN[1] for j in range(N)]
LEFT = torch.arange(N) >= torch.tensor([0, 1])[:, None]
IDS = torch.randint(3, 100, (2, N), generator=torch.Generator().manual_seed(1))


def _spans(keys: Tensor) -> Tensor:
    """What some keys `[n d]` span: the sum of products of each with itself, rows of length one."""
    d = keys.shape[1]
    out = torch.zeros(d, d, dtype=keys.dtype)
    for k in keys:
        u = (k + 1e-6) / torch.sqrt(((k + 1e-6) ** 2).sum())
        out = out + torch.outer(u, u)
    return torch.stack([row / torch.sqrt((row**2).sum()) if row.any() else row for row in out])


def _aligned(keys: Tensor, image: list[bool], p: dict[str, Tensor], read: list[int]) -> Tensor:
    """Keys of one head and text `[n d]`, of which those at `read` span the spaces."""
    spaces = [_spans(keys[[j for j in read if image[j] is kind]]) for kind in (False, True)]  # for images, for texts
    out = []
    for j, k in enumerate(keys):
        kind = 0 if image[j] else 1
        u = (k + 1e-6) / torch.sqrt(((k + 1e-6) ** 2).sum())
        out.append(p["fuse"][kind] @ (k + p["ratio"][kind] * (u @ spaces[kind])))
    return torch.stack(out)


def _params(d: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        "ratio": torch.randn(2, d, generator=draw, dtype=dtype),
        "fuse": torch.randn(2, d, d, generator=draw, dtype=dtype) / math.sqrt(d),
    }


def _drawn() -> tuple[Bare, dict[str, Tensor]]:
    bare = Bare(Shape(q=N, k=N), dtype=torch.float64, rules=(Causal(), Padding(LEFT)))
    return bare, _params(8)


def _by_hand(bare: Bare, p: dict[str, Tensor]) -> Tensor:
    keys = torch.stack(
        [
            torch.stack([_aligned(bare.k[b, g], IMAGE, p, [j for j in range(N) if LEFT[b, j]]) for g in range(2)])
            for b in range(2)
        ]
    )
    seen = torch.ones(N, N, dtype=torch.bool).tril() & LEFT[:, None]
    scores = (bare.q @ keys.repeat_interleave(2, 1).mT / math.sqrt(8)).masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ bare.v.repeat_interleave(2, 1)


def test_keys_meet_the_space_of_the_other_kind() -> None:
    bare, p = _drawn()
    assert close(bare.run(MODA(), "reference", params=p)[0], _by_hand(bare, p))


def test_the_first_steps_loss_and_gradient() -> None:
    bare, p = _drawn()
    leaves = [*p.values(), bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    losses = [x[LEFT[:, None].expand(-1, 4, -1)].pow(2).sum() for x in (_run(bare, p), _by_hand(bare, p))]
    assert close(losses[0].detach(), losses[1].detach())
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def _run(bare: Bare, p: dict[str, Tensor]) -> Tensor:
    return bare.run(MODA(), "reference", params=p)[0]


def test_what_is_written_later_is_aligned_with_what_was_read() -> None:
    model: Any = models.tiny("llama")
    d, layers = model.config.head_dim, model.config.num_hidden_layers
    p, read = _params(d, torch.float32), 6
    with attach(model, MODA(), roles={"image": (SPAN,)}) as run, torch.no_grad():
        for layer in range(layers):
            for name, x in p.items():
                dict(zip(run.state_dict(), run.parameters(), strict=True))[f"0.{layer}.{name}"].copy_(x)
        found, _ = in_pieces(run, IDS, (read, 1, 2))
        first = run(IDS[:, :read]).logits

    def attending(ids: Tensor) -> Tensor:
        def attend(_: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
            q, k = rotate(q), rotate(k)
            keys = [[_aligned(x, IMAGE, p, list(range(read))) for x in text] for text in k]
            return heads_of(causal_map(q, torch.stack([torch.stack(text) for text in keys])), v)

        with torch.no_grad():
            return model.lm_head(llama_states(model, ids, attend))

    assert close_model(found, attending(IDS))
    assert close_model(first, attending(IDS)[:, :read])


def test_an_image_that_comes_later_settles_the_spaces() -> None:
    bare, p = _drawn()
    state = State()
    call = replace(bare.call, params=p, state=state, roles={"image": bare.call.roles["image"]})
    none = replace(call, keys=call.keys.take(slice(0, 2)))
    assert torch.equal(MODA().align(bare.k[:, :, :2], none), bare.k[:, :, :2])  # as it is until there is an image
    assert "spaces" not in state.cache
    whole = MODA().align(bare.k, call)
    assert close(whole[0, 0], _aligned(bare.k[0, 0], IMAGE, p, list(range(N))))
    assert close(MODA().align(bare.k[:, :, :6], replace(call, keys=call.keys.take(slice(0, 6)))), whole[:, :, :6])


def test_each_text_has_images_of_its_own_or_none() -> None:
    model: Any = models.tiny("llama")
    p = _params(model.config.head_dim, torch.float32)

    def read(ids: Tensor, roles: Any, pieces: tuple[int, ...]) -> Tensor:
        with attach(model, MODA(), roles=roles) as run, torch.no_grad():
            for name, x in zip(run.state_dict(), run.parameters(), strict=True):
                x.copy_(p[name.split(".")[-1]])
            return in_pieces(run, ids, pieces)[0]

    early, late, none = {"image": (SPAN,)}, {"image": ((6, 8),)}, {}
    ids = torch.cat([IDS, IDS[:1].flip(-1)])
    for pieces in ((N,), (5, 4)):
        together = read(ids, [early, late, none], pieces)
        for b, own in enumerate((early, late)):
            assert close_model(together[b], read(ids[b : b + 1], own, pieces)[0])
        with torch.no_grad():
            assert close_model(together[2], model(ids[2:]).logits[0])


def test_narrow_keys_stay_narrow() -> None:
    bare, p = _drawn()
    p = {name: x.float() for name, x in p.items()}
    found = MODA().align(bare.k.bfloat16(), replace(bare.call, params=p, state=State()))
    assert found.dtype == torch.bfloat16
    exact = MODA().align(bare.k.bfloat16().float(), replace(bare.call, params=p, state=State()))
    assert torch.equal(found, exact.bfloat16())


def test_the_start() -> None:
    found = MODA(ratio=0.3).parameters(Layer(0, 4, 2, 6, 6, 25))
    assert close(found["ratio"], torch.full((2, 6), 0.3))
    assert all(torch.equal(x, torch.eye(6)) for x in found["fuse"])
    assert len(found["fuse"]) == 2
    assert (MODA().ratio, MODA().role) == (0.0, "image")


def test_errors() -> None:
    call = Bare().call
    assert not MODA().idle(call)
    assert MODA().idle(replace(call, cross=True))
    assert MODA().idle(replace(call, roles={}))
    with pytest.raises(FieldError, match=r"MODA.ratio = inf: must be finite"):
        MODA(ratio=math.inf)
    with pytest.raises(FieldError, match=r"MODA.role = '': must name a role"):
        MODA(role="")
