"""Clipped softmax: exact zeros and ones."""

from __future__ import annotations

import pytest
import torch

from heedful import attach, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, InactiveWarning
from heedful.methods.mechanisms.normalise.clipped_softmax import ClippedSoftmax


def test_the_formula_in_every_backend() -> None:
    bare = Bare()
    k, v = (x.repeat_interleave(2, 1) for x in (bare.k, bare.v))
    keep = torch.ones(19, 19, dtype=torch.bool).tril()
    soft = ((bare.q @ k.mT) * bare.call.scale).masked_fill(~keep, float("-inf")).softmax(-1)
    wanted = torch.minimum(torch.maximum(1.3 * soft - 0.1, torch.zeros(())), torch.ones(())) @ v
    for backend in ("reference", "tiled"):
        heads, _ = bare.run(ClippedSoftmax(gamma=-0.1, zeta=1.2), backend, tile_rows=7 if backend == "tiled" else None)
        assert close(heads, wanted)


def test_small_weights_are_zero_large_ones_one_and_neither_has_a_gradient() -> None:
    scores = torch.tensor([[[[8.0, 0.0, -1.0]]]], requires_grad=True)
    weights = ClippedSoftmax(gamma=-0.1, zeta=1.1).clip(scores, None)  # type: ignore[arg-type]
    assert weights.tolist() == [[[[1.0, 0.0, 0.0]]]]
    weights.sum().backward()
    assert not bool(scores.grad.any())  # type: ignore[union-attr]


def test_masked_pairs_stay_at_zero_with_zeta_above_one() -> None:
    scores = torch.tensor([0.0, 0.5, torch.finfo(torch.float32).min])[None, None, None]
    assert float(ClippedSoftmax(gamma=0.0, zeta=1.5).clip(scores, None)[..., 2]) == 0.0  # type: ignore[arg-type]


def test_neutral_changes_no_bit() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    inputs = models.tiny_inputs(model)
    neutral = ClippedSoftmax.neutral()
    with (
        torch.no_grad(),
        pytest.warns(InactiveWarning, match="changed nothing"),
        attach(model, neutral, backend="reference") as run,
    ):
        found = run(**inputs).logits
    assert torch.equal(found, model(**inputs).logits)


def test_settings_are_checked() -> None:
    with pytest.raises(FieldError, match=r"ClippedSoftmax.gamma = 0.1: must lie from -1000.0 to 0"):
        ClippedSoftmax(gamma=0.1)
    with pytest.raises(FieldError, match=r"ClippedSoftmax.zeta = 0.9: must lie from 1 to 1000.0"):
        ClippedSoftmax(zeta=0.9)
    with pytest.raises(FieldError, match="gamma = nan"):
        ClippedSoftmax(gamma=float("nan"))
