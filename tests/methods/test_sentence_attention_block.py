"""SentenceAttentionBlock against means and products in loops over tokens and channels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer, Phase
from heedful.conformance.bare import Bare, Shape, parameters
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.regions import PerText, Region
from heedful.methods import SentenceAttentionBlock

N, E = 9, 6
WORDS = [((0, 1), (6, 8)), ((7, 9),)]
PATCHES = ((1, 5),)


def case(method: SentenceAttentionBlock) -> tuple[Call, Tensor]:
    draw = torch.Generator().manual_seed(1)
    bare = Bare(Shape(q=N, k=N, e=E), dtype=torch.float64)
    given = parameters(method, bare.shape.layer, torch.float64)
    params = {name: x + torch.randn(x.shape, generator=draw).double() / 4 for name, x in given.items()}
    roles = {"sentence": PerText(Region(spans) for spans in WORDS), "patches": Region(PATCHES, (2, 2))}
    call = replace(bare.call, roles=roles, params=params)
    return call, torch.randn(2, N, E, generator=draw, dtype=torch.float64)


def by_hand(x: Tensor, p: dict[str, Tensor], words: list[int], patches: list[int]) -> Tensor:
    """One text `[n e]`: the authors' block, told the mean of the words, on channels of patches."""
    told = [sum(x[token, channel] for token in words) / max(1, len(words)) for channel in range(E)]

    def mapped(x: list[Tensor], name: str) -> list[Tensor]:
        biases = p[f"{name}_bias"]
        return [sum((w * y for w, y in zip(row, x, strict=True)), c) for row, c in zip(p[name], biases, strict=True)]

    inner = mapped(told, "in")
    mean = sum(inner) / len(inner)
    wide = torch.sqrt(sum((y - mean) ** 2 for y in inner) / len(inner) + 1e-5)
    inner = [(y - mean) / wide * g + c for y, g, c in zip(inner, p["norm"], p["norm_bias"], strict=True)]
    last = mapped([y * (y > 0) for y in inner], "out")
    shares = [torch.exp(y) / sum(torch.exp(z) for z in last) for y in last]
    rows = [[x[n, c] * (E * shares[c] if n in patches else 1) for c in range(E)] for n in range(N)]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("widening", [1, 3])
def test_words_tell_the_gate_and_it_learns(widening: int) -> None:
    method = SentenceAttentionBlock(widening)
    call, x = case(method)
    params = dict(call.params)
    leaves = [x, *params.values()]
    for leaf in leaves:
        leaf.requires_grad_(True)
    found = method.gate(x, call)
    wanted = torch.stack([by_hand(x[0], params, [0, 6, 7], [1, 2, 3, 4]), by_hand(x[1], params, [7, 8], [1, 2, 3, 4])])
    assert close(found, wanted)
    losses = [(y - 1).square().mean() for y in (found, wanted)]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)
    assert bool(wanted[:, 1:5].ne(x[:, 1:5]).all())
    assert torch.equal(found[:, 5:], x[:, 5:])


def test_a_text_without_words_or_patches() -> None:
    method = SentenceAttentionBlock(2)
    call, x = case(method)
    call = replace(call, roles={"sentence": Region(((20, 22),)), "patches": Region(PATCHES, (2, 2))})
    assert close(method.gate(x, call)[1], by_hand(x[1], dict(call.params), [], [1, 2, 3, 4]))
    call = replace(call, roles={"sentence": Region(((0, 2),)), "patches": Region(((20, 24),), (2, 2))})
    assert torch.equal(method.gate(x, call), x)


def test_it_acts_where_text_is_read() -> None:
    call, _ = case(SentenceAttentionBlock())
    assert not SentenceAttentionBlock().idle(call)
    assert SentenceAttentionBlock().idle(replace(call, phase=Phase.DECODE))
    assert SentenceAttentionBlock().idle(replace(call, cross=True))


def test_a_model_is_served_and_learns() -> None:
    model = models.tiny("vit", image_size=16)
    with attach(model, SentenceAttentionBlock(4), roles={"sentence": ((0, 1),)}) as run:
        run(**models.tiny_inputs(model), output_hidden_states=True).hidden_states[-1].square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in run.parameters())


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=40)
    found, again = (SentenceAttentionBlock().parameters(layer) for _ in range(2))
    drawn = {"in": (160, 40), "in_bias": (160,), "out": (40, 160), "out_bias": (40,)}
    shapes = drawn | {"norm": (160,), "norm_bias": (160,)}
    assert {name: tuple(x.shape) for name, x in found.items()} == shapes
    other = SentenceAttentionBlock().parameters(replace(layer, number=0))
    for name in drawn:
        assert torch.equal(found[name], again[name])
        assert not torch.equal(found[name], other[name])
    assert bool((found["norm"] == 1).all())
    assert not found["norm_bias"].any()


def test_what_cannot_be() -> None:
    assert SentenceAttentionBlock() == SentenceAttentionBlock(4, "sentence", "patches")
    assert SentenceAttentionBlock.example() == SentenceAttentionBlock(2, "marked")
    assert SentenceAttentionBlock(1).widening == 1
    for widening in (0, -1):
        with pytest.raises(FieldError, match=rf"widening = {widening}: must be 1 or more; .*4"):
            SentenceAttentionBlock(widening)
    with pytest.raises(FieldError, match=r"sentence = '': must name a role; .*sentence"):
        SentenceAttentionBlock(sentence="")
    with pytest.raises(FieldError, match=r"patches = '': must name a role; .*patches"):
        SentenceAttentionBlock(patches="")
