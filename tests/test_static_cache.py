"""A cache with room for more than the text: its empty slots are no tokens, to no method."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close_model
from heedful.core.method import Method
from heedful.methods.mechanisms.pooling.combiner import Combiner
from heedful.methods.mechanisms.routed.mosa import MoSA
from heedful.methods.mechanisms.routed.routing_transformer import RoutingTransformer
from heedful.methods.mechanisms.score.dual_attention import DualAttention
from heedful.methods.sparse.prefill.seer_attention import SeerAttention
from heedful.models import tiny

KINDS = (MoSA, RoutingTransformer, Combiner, DualAttention, SeerAttention)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_empty_slots_are_no_tokens(kind: type[Method], padded: bool) -> None:
    model, draw = tiny("llama"), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 14), generator=draw)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    with attach(model, kind.example()) as run:
        told = []
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
            parts = [(0, 11), (11, 12), (12, 14)]
            found = [run(input_ids=ids[:, a:b], attention_mask=mask[:, :b], **{CACHE: cache}).logits for a, b in parts]
            told.append(torch.cat(found, 1)[mask.bool()])
    assert close_model(*told)
