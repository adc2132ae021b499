"""Where sums do not go on, and which keys count, on calls without a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.subjects import CROSS, SPLIT, tiny_model
from heedful.conformance.tolerances import close_model
from heedful.core.errors import SiteError
from heedful.core.mask import Mask
from heedful.core.positions import Positions
from heedful.kit.running import Running, text_keys
from heedful.methods import EfficientAttention, FlowAttention


def test_sums_go_on_where_those_of_all_texts_ended() -> None:
    bare = Bare(Shape(q=3, k=8))
    for ends, goes_on in (([5, 5], True), ([5, 4], False), ([4, 4], False)):
        bare.call.state.cache["end"] = torch.tensor(ends)
        found = Running(bare.call, bare.k)
        assert found.goes_on == goes_on
        assert found.cut(bare.k).shape[2] == (3 if goes_on else 8)


def test_keys_that_count_are_held_and_no_padding() -> None:
    text = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    call = Bare(Shape(q=6, k=6), text=text).call
    found = text_keys(call, 6)
    assert found is not None
    assert found.expand(2, 2, 6)[:, 0].tolist() == text.tolist()
    held = torch.tensor([[[True] * 5 + [False]], [[False, True] * 3]])
    keys = replace(Positions.row(0, 6), is_filled=held)
    found = text_keys(replace(call, keys=keys), 6)
    assert found is not None
    assert found.expand(2, 2, 6)[:, 0].tolist() == (held[:, 0] & text).tolist()
    assert text_keys(Bare(Shape(q=6, k=6)).call, 6) is None


@torch.no_grad()
def test_tokens_that_were_cut_off_and_replaced_elsewhere_are_no_part_of_the_sums() -> None:
    """As many tokens as before, of which the last four are others that the model read alone."""
    model = models.tiny("llama")
    ids, other = torch.randint(3, 127, (2, 1, 16), generator=torch.Generator().manual_seed(0))
    with attach(model, EfficientAttention()) as run:
        cache = run(input_ids=ids[:, :12], use_cache=True)[CACHE]
    cache.crop(-4)
    model(input_ids=other[:, 8:12], **{CACHE: cache})
    fresh = DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        fresh.update(layer.keys, layer.values, number)
    with attach(model, EfficientAttention()) as run:
        wanted = run(input_ids=other[:, 12:], **{CACHE: fresh}).logits
        assert close_model(run(input_ids=other[:, 12:], **{CACHE: cache}).logits, wanted)


@torch.no_grad()
def test_sums_over_queries_that_were_cut_off_and_replaced_elsewhere_are_refused() -> None:
    model, ids = models.tiny("llama"), torch.arange(3, 19)[None]
    with attach(model, FlowAttention()) as run:
        cache = run(input_ids=ids[:, :12], use_cache=True)[CACHE]
    cache.crop(-4)
    model(input_ids=ids[:, 8:12], **{CACHE: cache})
    with pytest.raises(SiteError, match="the cache was cut back since"), attach(model, FlowAttention()) as run:
        run(input_ids=ids[:, 12:], **{CACHE: cache})


def test_what_is_spread_over_query_heads_is_hidden_as_their_key_heads_are() -> None:
    call = Bare(Shape(q=6, k=6)).call
    held = torch.tensor([[[True] * 5 + [False], [False, True, True] * 2]])
    running = Running(replace(call, keys=replace(Positions.row(0, 6), is_filled=held)), torch.ones(2, 2, 6, 8))
    found = running.hide(torch.ones(2, 4, 6, 3))
    assert found[1, :, :, 2].tolist() == held[0].repeat_interleave(2, 0).float().tolist()


@torch.no_grad()
def test_sums_over_queries_are_refused_where_a_decoder_looks_across_and_nowhere_else() -> None:
    model, inputs = tiny_model("bart"), SPLIT.inputs()
    n = inputs["decoder_input_ids"].shape[1]
    both_sides = {**inputs, "decoder_attention_mask": torch.ones(2, 1, n, n, dtype=torch.bool)}
    for only in (CROSS.only, ["model.decoder.layers.0"]):  # the self attention before it is served, or is not
        with pytest.raises(SiteError, match="of later ones"), attach(model, FlowAttention(), only=only) as run:
            run(**inputs)
    plain = model(**both_sides).logits
    with attach(model, FlowAttention(), only=CROSS.only) as run:
        assert not close_model(run(**both_sides).logits, plain)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_sums_over_queries_are_refused_in_the_cross_attention_of_torch_s_decoder_too(padded: bool) -> None:
    layer = nn.TransformerDecoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).eval()
    x, memory = torch.randn(2, 2, 6, 32, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if padded else None  # makes the mask a table
    how = {"tgt_mask": torch.ones(6, 6).triu(1).bool(), "tgt_key_padding_mask": padding}
    across = FlowAttention().on(layers=[1, 3])
    with attach(model, across, inputs=(x, memory)) as run:
        assert run(x, memory).shape == x.shape  # whose tokens see later ones anyway
        with pytest.raises(SiteError, match="in a decoder's cross-attention"):
            run(x, memory, **how)


def test_sums_over_queries_are_no_secret_where_a_method_opened_the_mask_of_a_text() -> None:
    bare = Bare(Shape(q=6, k=6))
    opened = replace(bare.call, mask=Mask(), in_order=True)
    assert Running(opened, bare.k, own=True).cut(bare.k).shape[2] == 6
    with pytest.raises(SiteError, match="in a decoder's cross-attention"):
        Running(replace(opened, cross=True), bare.k, own=True)
