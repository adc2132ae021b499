"""Implementations that ask the config for their name, as transformers' flash attention does: it is their own name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM
from transformers.integrations import flash_attention

from heedful import attach, models
from heedful.conformance.tolerances import close_model

from .samples import Scale

NAME = "flash_attention_2"
IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A model's calls of flash attention, by the name that its function was told; computed by torch's kernel."""
    told: list[str] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
        told.append(more["attn_implementation"])
        if told[-1] != NAME:
            raise ValueError(f"no flash attention of name {told[-1]!r}")
        assert mask is None, "nothing here is padded"
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal = more["is_causal"] and q.shape[2] > 1
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    return told


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def made() -> Any:
    model = models.tiny("llama").eval()
    model.config._attn_implementation_internal = NAME
    return model


def test_layers_left_alone_run_under_their_own_name(flash: list[str]) -> None:
    model = made()
    plain = logits(model)
    assert flash == [NAME, NAME]
    with attach(model, Scale().on(layers=[1])) as run:
        found = logits(run)
        assert set(run.activity().backends.values()) == {f"the model's own ({NAME})", "sdpa"}
        assert model.config._attn_implementation == "heedful"
    assert flash == [NAME] * 3
    model.config._attn_implementation_internal = "sdpa"
    with attach(model, Scale().on(layers=[1])) as run:
        assert close_model(found, logits(run))
    assert not close_model(found, plain)


def test_phases_left_alone_run_under_their_own_name(flash: list[str]) -> None:
    model = made()
    plain, prompt = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False), logits(model)
    with attach(model, Scale().when("decode")) as run:
        assert torch.equal(logits(run), prompt)
        found = run.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert set(flash) == {NAME}
    assert found.shape == plain.shape
    assert torch.equal(found[:, :13], plain[:, :13]), "the first new token is the prompt's"


def test_a_model_beside_an_attached_one_of_the_same_config_does_too(flash: list[str]) -> None:
    config = models.tiny("llama").config
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    config._attn_implementation_internal = NAME
    plain = logits(second)
    with attach(first, Scale()):
        assert torch.equal(logits(second), plain)
    assert set(flash) == {NAME}


def test_the_name_is_back_after_an_error(flash: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", fails)
    run = attach(model, Scale().on(layers=[1]))
    with pytest.raises(RuntimeError, match="out of memory"):
        logits(run)
    assert model.config._attn_implementation == "heedful"
    run.close()
    assert model.config._attn_implementation == NAME
