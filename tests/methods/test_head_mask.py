"""HeadMask: heads that give nothing in a forward of training, drawn or by importance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods.mechanisms.gates.head_mask import HeadMask
from tests.by_hand import causal_map, heads_of, llama_states
from tests.test_checkpointing import checkpointed

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
LAYERS, HEADS = 2, 4
pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing")


def drawn(seed: int, forward: int, masked: int) -> list[list[float]]:
    """Each layer's gates: the highest of as many random numbers as the model has heads are shut."""
    numbers = torch.rand(LAYERS * HEADS, generator=torch.Generator().manual_seed(1_000_003 * seed + forward)).tolist()
    least = sorted(numbers, reverse=True)[masked - 1]
    flat = [float(x < least) for x in numbers]
    return [flat[i * HEADS : (i + 1) * HEADS] for i in range(LAYERS)]


@pytest.mark.parametrize(("seed", "forward"), [(0, 0), (0, 5), (3, 1)])
def test_heads_are_drawn_over_all_layers(seed: int, forward: int) -> None:
    bare = Bare()
    heads = torch.randn(2, HEADS, 19, 8)
    for layer, gates in enumerate(drawn(seed, forward, 3)):
        call = replace(bare.call, layer=layer, depth=LAYERS, forward=forward)
        found = HeadMask(3 / 8, seed=seed).mask(heads, call)
        for head, gate in enumerate(gates):
            assert torch.equal(found[:, head], gate * heads[:, head])


def test_every_forward_draws_anew() -> None:
    """And the same run again the same."""
    model, kept = models.tiny("llama").train(), []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        for layer in model.model.layers
    ]
    shut = []
    for _ in range(2):
        with torch.no_grad(), attach(model, HeadMask(0.25)) as run:
            for _ in range(3):
                kept.clear()
                run(IDS)
                heads = torch.cat([x.unflatten(-1, (HEADS, -1)) for x in kept], 2)  # [b n layers * h d]
                shut.append(tuple((~heads.any(-1)).all(0).all(0).nonzero().flatten().tolist()))
    for handle in handles:
        handle.remove()
    assert all(len(x) == 2 for x in shut)
    assert shut[:3] == shut[3:]
    assert len(set(shut[:3])) > 1


def test_at_rest_nothing_is_masked() -> None:
    model = models.tiny("llama")
    plain = model(IDS).logits
    for by in ("random", "importance"):
        with attach(model, HeadMask(0.5, by)) as run:
            assert torch.equal(run(IDS).logits, plain)
    with attach(model.train(), HeadMask(0.5)) as run:
        assert not close_model(run(IDS).logits, plain)
    with attach(model, HeadMask.neutral()) as run:
        assert torch.equal(run(IDS).logits, plain)


def by_hand(model: Any, gates: Sequence[Tensor]) -> Tensor:
    """The loss of a llama whose heads are multiplied with gates."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        return heads_of(causal_map(rotate(q), rotate(k)), v) * gates[layer][:, None, None]

    logits = model.lm_head(llama_states(model, IDS, attend))[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())


def most(importance: Sequence[Tensor], masked: int) -> list[Tensor]:
    """Gates that shut the heads of most importance, whatever their layers."""
    ranked = sorted(((float(x), i, h) for i, row in enumerate(importance) for h, x in enumerate(row)), reverse=True)
    shut = {(i, h) for _, i, h in ranked[:masked]}
    return [torch.tensor([float((i, h) not in shut) for h in range(len(row))]) for i, row in enumerate(importance)]


@pytest.mark.parametrize("share", [0.125, 0.375])
def test_the_most_important_heads_of_the_step_before(share: float) -> None:
    model = models.tiny("llama").train()
    gates = [torch.ones(HEADS) for _ in range(LAYERS)]
    with attach(model, HeadMask(share, "importance")) as run:
        for _ in range(4):
            found = run(IDS, labels=IDS, use_cache=False).loss
            found.backward()
            leaves = [g.clone().requires_grad_() for g in gates]
            want = by_hand(model, leaves)
            want.backward()
            assert close_model(found.detach(), want.detach())
            gates = most([g.grad.abs() for g in leaves], round(share * 8))
    assert sum(int((g == 0).sum()) for g in gates) == round(share * 8)


def test_importance_is_ranked_among_the_layers_that_are_served() -> None:
    model = models.tiny("llama").train()
    with attach(model, HeadMask(0.5, "importance").on(layers=[1])) as run:
        run(IDS, labels=IDS).loss.backward()
        found = run(IDS, labels=IDS).loss.detach()
    leaf = torch.ones(HEADS, requires_grad=True)
    by_hand(model, [torch.ones(HEADS), leaf]).backward()
    gates = most([leaf.grad.abs()], 2)  # type: ignore[union-attr]
    assert close_model(found, by_hand(model, [torch.ones(HEADS), *gates]).detach())


def test_without_a_backward_pass_nothing_is_known_to_matter() -> None:
    model = models.tiny("llama").train()
    with torch.no_grad():
        plain = model(IDS).logits
        with attach(model, HeadMask(0.5, "importance"), backend="reference") as run:
            assert close_model(run(IDS).logits, plain)
            assert close_model(run(IDS).logits, plain)


@pytest.mark.parametrize("by", ["random", "importance"])
def test_a_checkpoint_masks_again_what_it_masked(by: str) -> None:
    found = []
    for model in (models.tiny("llama").train(), checkpointed(reentrant=False)):
        with attach(model, HeadMask(0.5, by)) as run:
            for _ in range(3):
                model.zero_grad()
                run(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert close_model(found[1], found[0])


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"HeadMask.share = 1.5: must lie from 0 to 1"):
        HeadMask(1.5)
    with pytest.raises(FieldError, match=r"HeadMask.by = 'size': must be 'random' or 'importance'"):
        HeadMask(by="size")
