"""FP4: four-bit floats in blocks, and what rounding each part alone costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import fit, fold, models, operate
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods import FP4
from heedful.methods.compress.quantise.fp4 import e2m1

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = sorted(
    {m / 8 * 2.0**-6 for m in range(8)} | {(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)}
)


def nearest(x: float, values: tuple[float, ...] | list[float]) -> float:
    """Ties go to the value whose place is even, as its last bit is 0 then."""
    best = min(range(len(values)), key=lambda i: (abs(values[i] - abs(x)), i % 2))
    return math.copysign(values[best], x)


def by_hand(w: Tensor, form: str) -> Tensor:
    size = {"nvfp4": 16, "mxfp4": 32}[form]
    out = torch.zeros_like(w)
    whole = max(abs(x) for x in w.flatten().tolist()) / (6 * 448)
    for o in range(w.shape[0]):
        for start in range(0, w.shape[1], size):
            block = w[o, start : start + size].tolist()
            highest = max(map(abs, block))
            if not highest:
                continue
            if form == "mxfp4":
                scale = 2.0 ** (math.floor(math.log2(highest)) - 2)
            else:
                scale = nearest(highest / 6 / whole, E4M3[:-1]) * whole
            for i, x in enumerate(block):
                out[o, start + i] = scale * nearest(x / scale, VALUES)
    return out


def test_the_nearest_four_bit_float() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.26, 0.74, 4.9, 5.1, 7.0, 99.0, 0.0, 1e-9, 0.5, 1.0, 2.0])
    want = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 0.5, 0.5, 4.0, 6.0, 6.0, 6.0, 0.0, 0.0, 0.5, 1.0, 2.0]
    assert e2m1(x).tolist() == want
    assert e2m1(-x).abs().tolist() == want
    many = torch.linspace(-7, 7, 1001)
    assert e2m1(many).tolist() == [nearest(v, VALUES) for v in many.tolist()]


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("width", [64, 40])
def test_blocks_share_a_scale(form: str, width: int) -> None:
    x = torch.randn(3, width) * torch.logspace(-2, 2, width)[None, torch.randperm(width)]
    x[1, :32] = 0.0
    x[2] *= 1e-3
    found = FP4(form).in_blocks(x)
    assert close(found, by_hand(x, form))
    assert FP4(form).in_blocks(x.double()).dtype == torch.float64
    assert torch.equal(FP4(form).in_blocks(torch.zeros(2, 16)), torch.zeros(2, 16))


def test_scales_of_powers_of_two_reach_as_far_as_eight_bits_say() -> None:
    tiny = torch.full((1, 32), 2.0**-126)
    assert close(FP4("mxfp4").in_blocks(tiny), tiny)  # its scale would be 2^-128
    huge = torch.full((1, 32), 2.0**127)
    assert torch.equal(FP4("mxfp4").in_blocks(huge), huge)


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_a_model_of_four_bit_floats(form: str) -> None:
    model = models.tiny("llama")
    rounded = fold(model, FP4(form, projections="ko"))
    for old, new in zip(model.model.layers, rounded.model.layers, strict=True):
        for letter in "qkvo":
            a, b = (getattr(x.self_attn, f"{letter}_proj").weight.detach() for x in (old, new))
            assert close(b, by_hand(a, form) if letter in "ko" else a)


def batches(model: Any) -> list[dict[str, Tensor]]:
    ids = models.tiny_inputs(model, batch=3)["input_ids"]
    padded = torch.ones_like(ids[2:])
    padded[:, :2] = 0
    return [{"input_ids": ids[:2]}, {"input_ids": ids[2:], "attention_mask": padded}]


def loss(model: Any) -> float:
    total = 0.0
    for batch in batches(model):
        labels = batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(1)) == 0, -100)
        with torch.no_grad():
            total += model(**batch, labels=labels).loss.item() / 2
    return total


def test_each_projection_and_each_layer_alone() -> None:
    model = models.tiny("llama", num_hidden_layers=3)
    found = fit(FP4("mxfp4"), model, batches(model))
    wanted = {x: loss(operate(model, FP4("mxfp4", projections=x))) - loss(model) for x in "qkvo"}
    wanted |= {f"layer {i}": loss(operate(model, FP4("mxfp4", layers=(i,)))) - loss(model) for i in range(3)}
    table = found.table()
    assert set(table) == set(wanted)
    assert all(math.isclose(table[name], wanted[name], abs_tol=1e-5) for name in wanted)
    assert list(table.values()) == sorted(table.values(), reverse=True)
    assert found.form == "mxfp4"
    some = fit(FP4(projections="qv", layers=(0, 2)), model, batches(model)).table()
    assert set(some) == {"q", "v", "layer 0", "layer 2"}
    only = loss(operate(model, FP4(projections="q", layers=(0, 2)))) - loss(model)
    assert math.isclose(some["q"], only, abs_tol=1e-5)
    only = loss(operate(model, FP4(projections="qv", layers=(2,)))) - loss(model)
    assert math.isclose(some["layer 2"], only, abs_tol=1e-5)


def test_says_what_is_wrong() -> None:
    with pytest.raises(FieldError, match=r"FP4\.form = "):
        FP4("fp4")
    with pytest.raises(FieldError, match=r"FP4\.projections = "):
        FP4(projections="x")
    with pytest.raises(FieldError, match=r"FP4\.rises = None: is not known yet"):
        FP4().table()
    model = models.tiny("llama")
    with pytest.raises(FieldError, match=r"batches = 0"):
        fit(FP4(), model, [])
    with pytest.raises(FieldError, match=r"give this model no loss"):
        fit(FP4(), model.model, batches(model))
    assert FP4().form == "nvfp4"
    assert FP4.neutral().projections == ""
