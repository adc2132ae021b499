"""DIMAP: scores, cuts of modules over all layers, and what is left, against sorted lists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful import fit, models, operate
from heedful.conformance.tolerances import close
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.core.kinds.weights import HeadWeights
from heedful.methods import DIMAP

PROJECTIONS = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",)}


def _scored(weights: list[float]) -> list[float]:
    """Each weight's share of the squares that are left when all smaller ones are gone."""
    by_size = sorted(range(len(weights)), key=lambda i: -abs(weights[i]))
    out, left = [0.0] * len(weights), 0.0
    for i in by_size:
        left += weights[i] ** 2
        out[i] = weights[i] ** 2 / left if left else 0.0
    return out


def test_a_score_is_a_share_of_what_is_left() -> None:
    weights = [3.0, -4.0, 0.0, 1.0, 2.0]
    want = [9 / 25, 1.0, 0.0, 1 / 30, 4 / 29]
    assert close(DIMAP().scores(torch.tensor(weights)), torch.tensor(want, dtype=torch.float64))
    assert _scored(weights) == pytest.approx(want)
    assert close(DIMAP().scores(torch.tensor(weights) / 100), torch.tensor(want, dtype=torch.float64))
    assert DIMAP().scores(torch.zeros(3)).tolist() == [0.0] * 3
    many = torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert close(DIMAP().scores(many), torch.tensor(_scored(many.tolist()), dtype=torch.float64))


def _modules(model: object, name: str) -> list[list[float]]:
    """The weights of a module, layer by layer."""
    return [
        [x for part in PROJECTIONS[name] for x in getattr(layer.self_attn, part).weight.flatten().tolist()]
        for layer in model.model.layers  # type: ignore[attr-defined]
    ]


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_of_each_module_the_lowest_go_whichever_layer_they_are_in(share: float) -> None:
    model = models.tiny("llama")
    with torch.no_grad():  # so that one layer has more to lose than the other
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = getattr(model.model.layers[1].self_attn, name).weight
            weight.copy_(weight.sign() * weight.abs().pow(4))
    small = operate(model, fit(DIMAP(share), model, ()))
    for name in PROJECTIONS:
        before, after = _modules(model, name), _modules(small, name)
        scored = sorted((s, n, i) for n, layer in enumerate(before) for i, s in enumerate(_scored(layer)))
        gone = {(n, i) for _, n, i in scored[: round(share * len(scored))]}
        want = [[0.0 if (n, i) in gone else x for i, x in enumerate(layer)] for n, layer in enumerate(before)]
        assert after == want
        zeros = [sum(x == 0 for x in layer) / len(layer) for layer in after]
        assert zeros[1] > zeros[0] + 0.05
    for one, other in zip(model.model.layers, small.model.layers, strict=True):
        assert torch.equal(one.mlp.up_proj.weight, other.mlp.up_proj.weight)


def test_scores_up_to_the_cut_go_and_biases_stay() -> None:
    draw = torch.Generator().manual_seed(1)
    shapes = {"q": (4, 3, 8), "k": (2, 3, 8), "v": (2, 5, 8), "o": (8, 4, 5)}
    drawn: dict[str, Tensor] = {x: torch.randn(shape, generator=draw) for x, shape in shapes.items()}
    weights = HeadWeights(**drawn, q_bias=torch.ones(4, 3))
    layer = Layer(number=0, heads=4, kv_heads=2, head_dim=3, value_dim=5, width=8)
    found = DIMAP.example().operate(weights, layer)
    assert found.q_bias is weights.q_bias
    for letters in ("qkv", "o"):
        before, after = (
            [x for letter in letters for x in getattr(of, letter).flatten().tolist()] for of in (weights, found)
        )
        assert after == [0.0 if s <= 1e-3 else x for x, s in zip(before, _scored(before), strict=True)]
        assert 0 < sum(x == 0 for x in after) < len(after)


def test_a_share_that_takes_nothing_changes_nothing() -> None:
    model = models.tiny("llama")
    found = fit(DIMAP(1e-9), model, ())
    assert found.cuts is not None
    assert {name: float(x) for name, x in found.cuts.items()} == {"qkv": -1.0, "o": -1.0}
    small = operate(model, found)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small.parameters(), strict=True))
    weights = HeadWeights(*(torch.ones(1, 1, 1) for _ in range(4)))
    assert DIMAP.neutral().operate(weights, Layer(0, 1, 1, 1, 1, 1)) is weights


def test_what_cannot_be() -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(FieldError, match=rf"share = {share}: must be 0 or more, and below 1; .*0.5"):
            DIMAP(share)
    assert DIMAP().share == 0.5
    assert DIMAP(0.0) == DIMAP.neutral()
    with pytest.raises(FieldError, match="cuts = None: are not known yet: fit"):
        operate(models.tiny("llama"), DIMAP())


def test_of_many_equal_weights_the_later_go_first() -> None:
    found = DIMAP().scores(torch.ones(40))
    assert close(found, 1 / torch.arange(1, 41).double())
