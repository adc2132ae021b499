"""Impermissible: the penalty in loops, its gradient, and that it joins the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods import Impermissible
from tests.by_hand import causal_map, heads_of, llama_states

SPANS = [((1, 3),), ((0, 1), (4, 5))]  # of each text
N = 6


def by_hand(model: Any, ids: Tensor, pads: tuple[int, int], asks: Any, factor: float) -> Tensor:
    """The penalty of all layers, head by head and query by query; a text's tokens count from behind its padding."""
    total = torch.zeros((), dtype=torch.float64)
    seen: list[list[Tensor]] = [[], []]

    for text, pad in zip(ids, pads, strict=True):

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
            weights = causal_map(rotate(q), rotate(k))
            seen[i].append(weights[0])
            return heads_of(weights, v)

        llama_states(model, text[None, pad:], attend)
    for maps in seen:
        layer, count = torch.zeros((), dtype=torch.float64), 0
        for weights, spans in zip(maps, SPANS, strict=True):
            for h in range(4):
                for m in range(weights.shape[1]):
                    if not asks(m):
                        continue
                    count += 1
                    places = [n for a, b in spans for n in range(a, min(b, weights.shape[2]))]
                    left = 1 - sum(weights[h, m, n] for n in places)
                    layer = layer + (torch.log(left) if left > 1e-6 else torch.tensor(math.log(1e-6)))
        total = total - factor * layer / count
    return total


@pytest.mark.parametrize("asking", ["", "asking"])
@pytest.mark.parametrize("pads", [(0, 0), (0, 1)])
def test_the_penalty_and_its_gradient(asking: str, pads: tuple[int, int]) -> None:
    model = models.tiny("llama", dtype=torch.float64, num_key_value_heads=2)
    ids = torch.randint(3, 100, (2, N))
    mask = (torch.arange(N) >= torch.tensor(pads)[:, None]).long()
    inputs = {"input_ids": ids, **({"attention_mask": mask} if any(pads) else {})}
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    roles = [{"impermissible": spans, "asking": ((3, 5),)} for spans in SPANS]
    with attach(model, Impermissible(0.7, asking=asking), roles=roles) as run:
        run(**inputs, **positions, use_cache=False)
        found = run.loss()
    wanted = by_hand(model, ids, pads, (lambda m: 3 <= m < 5) if asking else (lambda m: True), 0.7)
    assert close_model(found, wanted.float())
    names = ("q_proj", "k_proj")
    weights = [getattr(layer.self_attn, name).weight for layer in model.model.layers for name in names]
    one, two = (torch.autograd.grad(x, weights, retain_graph=True) for x in (found, wanted))
    for a, b in zip(one, two, strict=True):
        assert b.abs().max() > 1e-6
        assert close_model(a.float(), b.float())


def test_it_joins_the_loss_and_training_hides_the_tokens() -> None:
    model = models.tiny("llama")
    ids = torch.randint(3, 100, (2, N))
    plain = model(input_ids=ids, labels=ids).loss
    with attach(model, Impermissible(), roles={"impermissible": ((2, 4),)}) as run:
        found = run(input_ids=ids, labels=ids).loss
        assert close_model(found, plain + run.loss())
        before, optimiser = run.loss().item(), torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(10):
            optimiser.zero_grad()
            run(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
        assert run.loss().item() < before


def test_says_what_is_wrong() -> None:
    assert Impermissible() == Impermissible(1.0, "impermissible", "")
    assert Impermissible.neutral() == Impermissible(0.0)
    for wrong in ({"weight": -0.1}, {"weight": math.inf}, {"role": ""}):
        with pytest.raises(FieldError, match=rf"Impermissible\.{next(iter(wrong))} = "):
            Impermissible(**wrong)
