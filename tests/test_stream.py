"""How far a reading of a stream is off, and which norms it is read through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config

from heedful import models
from heedful.core.errors import RefusedModel
from heedful.explaining import direct_logits, logit_lens
from heedful.explaining.stream import _off
from tests.samples import uneven
from tests.test_diagnose_texts import characters
from tests.test_logits import IDS, SIZES


def test_a_reading_is_off_by_its_largest_difference_over_the_largest_number() -> None:
    y = torch.tensor([1.0, -4.0])
    assert _off(y, y) == 0
    assert _off(torch.tensor([1.0, -6.0]), y) == 0.5
    assert _off(1.5e-5 * y, 1e-5 * y) == pytest.approx(0.5)
    assert _off(y, 0 * y) > 1e20


def test_logits_are_capped_as_the_model_caps_them() -> None:
    config = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        logits = model(input_ids=IDS[None]).logits[0]
    assert float(logits.abs().max()) > 0.04
    torch.testing.assert_close(logit_lens(model, IDS).logits[-1], logits)


def test_without_any_norm_the_parts_add_up_as_they_are() -> None:
    model = models.tiny("llama")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if "Norm" in type(child).__name__:
                setattr(module, name, nn.Identity())
    found = direct_logits(model, IDS, 3)
    parts = float(found.heads.sum() + found.mlps.sum() + found.biases.sum()) + found.embedding + found.rest
    assert parts == pytest.approx(found.total, rel=1e-4)


def test_an_answer_comes_without_the_tokens_that_a_text_begins_and_ends_with() -> None:
    model = models.tiny("llama")
    found = direct_logits(model, IDS, "c", tokenizer=characters(bert=True))
    assert found.total == direct_logits(model, IDS, ord("c")).total


def test_heads_behind_a_gate_are_refused() -> None:
    with pytest.raises(RefusedModel, match="a gate or a norm stands between heads and their output projection"):
        direct_logits(uneven(gated=True), IDS, 3)
    assert direct_logits(uneven(), IDS, 3).heads.shape == (2, 4)
