"""Sigmoid attention: every weight by itself."""

from __future__ import annotations

import pytest
import torch

from heedful import attach, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods.mechanisms.normalise.sigmoid_attention import SigmoidAttention


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_the_formula(backend: str) -> None:
    text = torch.ones(2, 19, dtype=torch.bool)
    text[0, :4] = False
    bare = Bare(text=text)
    heads, _ = bare.run(SigmoidAttention(19), backend, tile_rows=5 if backend == "tiled" else None)
    k, v = (x.repeat_interleave(2, 1) for x in (bare.k, bare.v))
    keep = torch.ones(19, 19, dtype=torch.bool).tril() & text[:, None, None]
    weights = 1 / (1 + 19 * torch.exp(-(bare.q @ k.mT) * bare.call.scale)) * keep
    assert close(heads, weights @ v)


def test_rows_sum_to_about_one_at_zero_scores() -> None:
    weights = SigmoidAttention(64).squash(None).of(torch.zeros(1, 1, 1, 64))  # type: ignore[arg-type]
    assert close(weights.sum(), torch.tensor(64 / 65))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_pairs_weigh_exactly_nothing(dtype: torch.dtype) -> None:
    scores = torch.full((1, 1, 1, 3), torch.finfo(dtype).min, dtype=dtype)
    assert not bool(SigmoidAttention(1).squash(None).of(scores).any())  # type: ignore[arg-type]
    assert not bool(SigmoidAttention(4096).squash(None).of(scores).any())  # type: ignore[arg-type]


def test_a_model_trains_under_it() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, SigmoidAttention(12)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_settings_are_checked() -> None:
    assert SigmoidAttention.neutral() is None
    with pytest.raises(FieldError, match=r"SigmoidAttention.length = 0: must be 1 or more"):
        SigmoidAttention(0)
