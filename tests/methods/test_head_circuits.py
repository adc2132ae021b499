"""HeadCircuits against whole matrices and their singular values, and on circuits that are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import heedful
from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import StatisticError
from heedful.methods import HeadCircuits

LAYERS, HEADS, D = 3, 4, 6


def llama() -> Any:
    torch.manual_seed(3)
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": 24, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    return models.tiny("llama", head_dim=D, **sizes)


def parts(model: Any, layer: int, h: int) -> tuple[torch.Tensor, ...]:
    """W_K' W_Q and W_O W_V of one head."""
    part = model.model.layers[layer].self_attn
    own, shared = slice(h * D, (h + 1) * D), slice(h // 2 * D, (h // 2 + 1) * D)
    asked = part.k_proj.weight[shared].T @ part.q_proj.weight[own]
    return asked.double(), (part.o_proj.weight[:, own] @ part.v_proj.weight[shared]).double()


@torch.no_grad()
def test_each_head_has_the_numbers_of_its_matrices() -> None:
    model = llama()
    found = heedful.fit(HeadCircuits(), model, ())
    places = [(n, h) for n in range(LAYERS) for h in range(HEADS)]
    assert found.of("heads").tolist() == [list(place) for place in places]
    for row, (n, h) in enumerate(places):
        for name, matrix in zip(("match", "copy"), parts(model, n, h), strict=True):
            wanted = matrix.trace() / torch.linalg.svdvals(matrix).sum()
            assert close(found.of(name)[row], wanted.float()), (name, n, h)
    for n in range(LAYERS):
        written = [parts(model, n, h)[1] for h in range(HEADS)]
        whole = sum(written, torch.zeros(24, 24, dtype=torch.float64)).norm() / sum(float(x.norm()) for x in written)
        assert close(found.of("left")[n], whole.float())


@torch.no_grad()
def test_likes_copies_and_opposites_that_are_made_are_seen() -> None:
    model = llama()
    part = model.model.layers[1].self_attn
    own, shared, other = slice(0, D), slice(0, D), slice(D, 2 * D)
    part.q_proj.weight[own] = 3 * part.k_proj.weight[shared]
    part.q_proj.weight[other] = -2 * part.k_proj.weight[shared]
    part.o_proj.weight[:, own] = 3 * part.v_proj.weight[shared].T
    part.o_proj.weight[:, other] = -3 * part.v_proj.weight[shared].T
    for h in (2, 3):
        part.o_proj.weight[:, h * D : (h + 1) * D] = 0
    found = heedful.fit(HeadCircuits(), model, ())
    assert close(found.of("match")[HEADS : HEADS + 2], torch.tensor([1.0, -1.0]))
    assert close(found.of("copy")[HEADS : HEADS + 4], torch.tensor([1.0, -1.0, 0.0, 0.0]))
    assert float(found.of("left")[1]) == pytest.approx(0.0, abs=1e-6)
    shown = found.describe()
    match, copy, left = shown.figures
    assert close(match.values[1], found.of("match")[HEADS : 2 * HEADS])
    assert close(copy.values[1], found.of("copy")[HEADS : 2 * HEADS])
    assert close(left.lines["all heads"], found.of("left"))
    assert shown.findings[0].text.startswith("By its weights head 1.0 copies what it reads most plainly (+1.00")
    part.o_proj.weight[:, own] *= -1
    part.o_proj.weight[:, other] = 0
    again = heedful.fit(HeadCircuits(), model, ()).describe().findings[0].text
    assert again.startswith("By its weights head 1.0 writes the contrary of what it reads most plainly (-1.00")


def test_without_weights_it_says_what_to_do() -> None:
    with pytest.raises(StatisticError, match=r"has seen no weights: heedful\.fit\(HeadCircuits\(\), model, \(\)\)"):
        HeadCircuits().of("match")
