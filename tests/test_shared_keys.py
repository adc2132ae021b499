"""Layers that attend to the keys of earlier ones, for some of the tokens alone, as Gemma 4 cuts its mask for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.adapters.lazymask import LazyMask, lazy_mask
from heedful.conformance.tolerances import close_model
from heedful.core.errors import UnknownArgument
from heedful.core.method import Stack
from heedful.methods import SnapKV

from .samples import Narrow

IDS = torch.randint(3, 100, (2, 14), generator=torch.Generator().manual_seed(0))
PADDED = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
PADDED["attention_mask"][0, :5] = 0
kernels = pytest.mark.parametrize("kernel", ["eager", "sdpa"])


def gemma(kernel: str) -> Any:
    few = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 8, "num_kv_shared_layers": 2}
    words = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "initializer_range": 0.3}
    types = ["sliding_attention", "full_attention"] * 2
    model = Gemma4ForCausalLM(Gemma4TextConfig(**few, **heads, **words, layer_types=types, sliding_window=6)).eval()
    model.set_attn_implementation(kernel)
    return model


@torch.no_grad()
@kernels
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_their_tokens_stand_where_they_do_in_the_others(kernel: str, kept: int) -> None:
    model = gemma(kernel)
    with attach(model, Stack()) as run:
        found = run(**PADDED, logits_to_keep=kept).logits
    assert torch.equal(found, model(**PADDED, logits_to_keep=kept).logits)
    with attach(model, Narrow(4)) as run:
        found = run(**PADDED, logits_to_keep=kept).logits
        alone = run(input_ids=IDS[:1, 5:], logits_to_keep=kept).logits
    assert close_model(found[:1, -alone.shape[1] :], alone)


@torch.no_grad()
@kernels
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_keys_that_were_dropped_meanwhile_are_refused(kernel: str, kept: int) -> None:
    with attach(gemma(kernel), SnapKV(0.25, window=4).on(layers=1)) as run:
        cache = run(input_ids=IDS, use_cache=True)[CACHE]
        with pytest.raises(UnknownArgument, match=r"layers\.3.* attends to the keys of another layer, .* dropped"):
            run(input_ids=IDS[:, :5], logits_to_keep=kept, **{CACHE: cache})


def test_rows_of_a_mask_are_those_of_the_mask_that_it_stands_for() -> None:
    given: dict[str, Any] = {"batch_size": 2, "q_length": 6, "kv_length": 14, "q_offset": 8}
    mask = lazy_mask(**given, attention_mask=PADDED["attention_mask"].bool())
    assert isinstance(mask, LazyMask)
    for cut in (slice(-2, None), slice(0, None), slice(1, 4), slice(-9, 2), slice(4, 2)):
        rows = mask[:, :, cut]
        assert isinstance(rows, LazyMask)
        assert torch.equal(rows.whole, mask.whole[:, :, cut])
        assert rows.shape == rows.whole.shape
    assert torch.equal(mask[:, :, -2:][:, :, 1:].whole, mask.whole[:, :, -1:])
    for other in (mask[:, :, ::2], mask[..., 2:], mask[:1]):
        assert not isinstance(other, LazyMask)
    assert torch.equal(mask[..., 2:], mask.whole[..., 2:])
