"""Heads of a chosen rank, written out head by head and token by token, with their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import FieldError, Layer, SiteError
from heedful.methods import RankedHeads
from tests.methods.sliced import E, N, agrees, masked

RANK, HEADS = 5, 3


def by_hand(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """One image `[n e]`, from the formula: maps of each head stand below one another, and the outputs are added."""
    rows = []
    for i in range(N):
        total = torch.zeros(E, dtype=x.dtype)
        for h in range(HEADS):
            mine = slice(h * RANK, (h + 1) * RANK)
            scores = [(p["query"][mine] @ x[i]) @ (p["key"][mine] @ x[j]) / math.sqrt(RANK) for j in range(N)]
            weights = torch.stack(scores).softmax(0)
            gathered = sum(w * (p["value"][mine] @ x[j]) for j, w in enumerate(weights))
            total = total + p["out"][:, mine] @ gathered
        rows.append(total)
    return torch.stack(rows)


def test_the_formula_and_the_first_step() -> None:
    agrees(RankedHeads(RANK, HEADS), by_hand)


def test_the_start() -> None:
    layer = Layer(0, 4, 4, 64, 64, 256)
    method = RankedHeads(100, 3)
    first, again = method.parameters(layer), method.parameters(layer)
    shapes = dict.fromkeys(("query", "key", "value"), (300, 256)) | {"out": (256, 300)}
    assert {name: tuple(w.shape) for name, w in first.items()} == shapes
    for name, w in first.items():
        bound = 1 / math.sqrt(shapes[name][1])
        assert torch.equal(w, again[name])
        assert not torch.equal(w, method.parameters(Layer(1, 4, 4, 64, 64, 256))[name])
        assert 0.99 * bound < float(w.max()) <= bound
        assert -bound <= float(w.min()) < -0.99 * bound
    assert not torch.equal(first["query"], first["key"])


def test_rank_and_number_are_chosen_apart() -> None:
    model = models.tiny("vit")
    for method in (RankedHeads(24, 1), RankedHeads(1, 30)):
        with attach(model, method) as run, torch.no_grad():
            assert run(**models.tiny_inputs(model)).logits.isfinite().all()


def test_says_what_is_wrong() -> None:
    for bad in ({"rank": 0}, {"heads": 0}):
        with pytest.raises(FieldError, match="1 or more"):
            RankedHeads(**bad)
    assert RankedHeads(1, 1).parameters(Layer(0, 4, 4, 6, 6, 24))["out"].shape == (24, 1)
    assert RankedHeads(24, 1).parameters(Layer(0, 4, 4, 6, 6, 24))["out"].shape == (24, 24)
    with pytest.raises(FieldError, match="at most the layer's width of 24"):
        RankedHeads(25, 1).parameters(Layer(0, 4, 4, 6, 6, 24))
    with pytest.raises(SiteError, match="layer 0: attention of a chosen rank is for images"):
        RankedHeads().attend(torch.zeros(1, N, E), masked({"out": torch.eye(E)}))
