"""GreedyPrune, patch by patch in loops, and in a vision model's later layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, InactiveWarning
from heedful.methods import GreedyPrune
from heedful.methods.sparse.prefill.greedy_prune import greedy


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def by_hand(salient: list[float], tokens: list[list[float]], count: int, weight: float) -> list[int]:
    kept: list[int] = []
    for _ in range(count):
        gains = {}
        for i in range(len(salient)):
            if i not in kept:
                alike = max((cosine(tokens[i], tokens[j]) for j in kept), default=0.0)
                gains[i] = salient[i] / max(salient) + weight * (1 - alike)
        kept.append(max(gains, key=lambda i: gains[i]))
    return sorted(kept)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 20.0])
@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_patch_by_patch(weight: float, count: int) -> None:
    draw = torch.Generator().manual_seed(int(10 * weight) + count)
    salient, tokens = torch.rand(3, 12, generator=draw), torch.randn(3, 12, 4, generator=draw) + 0.7
    tokens[:, 5] = 2 * tokens[:, 3]
    found = greedy(salient, tokens, count, weight)
    for row in range(3):
        wanted = by_hand(salient[row].tolist(), tokens[row].tolist(), count, weight)
        assert found[row].nonzero().flatten().tolist() == wanted


def test_a_copy_of_a_salient_patch_is_left_for_others() -> None:
    salient = torch.tensor([[1.0, 0.9, 0.2]])
    tokens = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]]])
    assert greedy(salient, tokens, 2, 1.0).tolist() == [[True, False, True]]
    assert greedy(salient, tokens, 2, 0.1).tolist() == [[True, True, False]]


@pytest.mark.parametrize(("share", "count"), [(0.25, 4), (0.3, 5)])
@torch.no_grad()
def test_later_layers_see_what_was_chosen(share: float, count: int) -> None:
    model: Any = models.tiny("vit", image_size=16, num_hidden_layers=2, attn_implementation="eager")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with heedful.attach(model, GreedyPrune(layer=0, share=share, diversity=0.2)) as run:
        found = run(pixel_values=images).logits
    layers = model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer
    for row in range(2):
        out = model.vit(images[row : row + 1], output_attentions=True, output_hidden_states=True)
        shown: Tensor = layers[0].layernorm_before(out.hidden_states[0])[0, 1:]
        got = [sum(float(head[i, j]) for head in out.attentions[0][0] for i in range(17)) for j in range(1, 17)]
        kept = by_hand(got, shown.tolist(), count, 0.2)
        x = layers[1](out.hidden_states[1][:, [0, *(1 + i for i in kept)]])
        x = x[0] if isinstance(x, tuple) else x
        assert close_model(found[row], model.classifier(model.vit.layernorm(x)[0, 0]))


def test_defaults_and_wrong_fields() -> None:
    assert (GreedyPrune().layer, GreedyPrune().share, GreedyPrune().diversity) == (22, 0.25, 1.0)
    for settings, match in (
        ({"share": 0.0}, r"GreedyPrune\.share = 0"), ({"share": 1.1}, r"GreedyPrune\.share"),
        ({"diversity": -0.1}, r"GreedyPrune\.diversity"), ({"diversity": math.inf}, r"GreedyPrune\.diversity"),
        ({"layer": -1}, r"GreedyPrune\.layer = -1"),
    ):  # fmt: skip
        with pytest.raises(FieldError, match=match):
            GreedyPrune(**settings)
    model: Any = models.tiny("vit")
    inputs = models.tiny_inputs(model)
    idle = pytest.warns(InactiveWarning, match="which was idle")
    with idle, torch.no_grad(), heedful.attach(model, GreedyPrune(layer=0, share=1.0)) as run:
        found = run(**inputs).logits
    assert torch.equal(found, model(**inputs).logits)
