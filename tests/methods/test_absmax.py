"""Absmax: a row's weights, or a matrix's, on evenly spaced values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import fold, models, operate
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods import Absmax


def by_hand(w: Tensor, bits: int, share: str) -> Tensor:
    top = 2 ** (bits - 1) - 1
    out = torch.zeros_like(w)
    for o in range(w.shape[0]):
        largest = max(abs(x) for x in (w[o] if share == "row" else w.flatten()).tolist())
        for i in range(w.shape[1]):
            out[o, i] = round(w[o, i].item() * top / largest) * largest / top
    return out


def projections(model: Any) -> dict[str, Tensor]:
    return {
        f"{layer}.{letter}": getattr(model.model.layers[layer].self_attn, f"{letter}_proj").weight.detach()
        for layer in range(2)
        for letter in "qkvo"
    }


@pytest.mark.parametrize("share", ["row", "matrix"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_each_weight_is_the_nearest_value(bits: int, share: str) -> None:
    model = models.tiny("llama")
    before, after = projections(model), projections(operate(model, Absmax(bits, share)))
    for name, w in before.items():
        assert close(after[name], by_hand(w, bits, share))
        values = {len(row.unique()) for row in after[name]}
        assert max(values) <= 2**bits - 1


def test_only_the_projections_and_layers_that_are_named() -> None:
    model = models.tiny("llama")
    before = projections(model)
    after = projections(operate(model, Absmax(3, projections="qo", layers=(1,))))
    assert {name for name, w in after.items() if not torch.equal(w, before[name])} == {"1.q", "1.o"}
    after = projections(operate(model, Absmax(3, layers=(0,))))
    assert {name for name, w in after.items() if not torch.equal(w, before[name])} == {f"0.{x}" for x in "qkvo"}
    assert all(torch.equal(w, before[n]) for n, w in projections(operate(model, Absmax(layers=()))).items())


@pytest.mark.parametrize("kind", ["gpt2", "bert", "mqa"])
def test_the_rounded_model_is_a_plain_one_and_loads(kind: str, tmp_path: Path) -> None:
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model)
    rounded = fold(model, Absmax(3))
    rounded.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, rounded(**inputs).logits)
        assert not torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_matrix_is_as_a_linear_map_has_it() -> None:
    seen: dict[str, Tensor] = {}

    class Seen(Absmax):
        def rounded(self, matrices: dict[str, Tensor], weights: Any, layer: Any) -> dict[str, Tensor]:
            seen.update(matrices)
            return matrices

    model = models.tiny("llama")
    operate(model, Seen(layers=(1,)))
    assert all(torch.equal(seen[letter], projections(model)[f"1.{letter}"]) for letter in "qkvo")


def test_defaults_and_neutral() -> None:
    assert (Absmax().bits, Absmax().share, Absmax().projections, Absmax().layers) == (8, "row", "qkvo", None)
    assert Absmax.neutral().projections == ""


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"bits": 1}, "bits"), ({"bits": 9}, "bits"), ({"share": "column"}, "share"),
        ({"projections": "qx"}, "projections"), ({"projections": "qq"}, "projections"), ({"layers": (-1,)}, "layers"),
    ],
)  # fmt: skip
def test_says_what_is_wrong(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError, match=rf"Absmax\.{field} = "):
        Absmax(**wrong)
    assert Absmax(bits=2, layers=(0,)).bits == 2
