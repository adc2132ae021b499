"""BlockAttention against documents that are read alone, kept, and turned to their places as the authors do it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from heedful import attach, models
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.core.mask import Mask, Where
from heedful.core.regions import PerText, Region
from heedful.methods import BlockAttention

SPANS = ((2, 6), (6, 9), (11, 14))


def sees(i: int, j: int, spans: tuple[tuple[int, int], ...]) -> bool:
    """Whether the token at place i computes the key at place j."""
    homes = [{n for n, (start, stop) in enumerate(spans) if start <= place < stop} for place in (i, j)]
    return j <= i and (not homes[0] or homes[0] == homes[1])


def table(n: int, spans: tuple[tuple[int, int], ...], pad: int = 0) -> torch.Tensor:
    return torch.tensor([[sees(i - pad, j - pad, spans) for j in range(n)] for i in range(n)])


def tile_of(bare: Bare, mask: Mask) -> torch.Tensor:
    call = bare.call.tile(slice(0, len(bare.call.queries)), slice(0, len(bare.call.keys)))
    keep = mask.keeps(call.pairs)
    assert keep is not None
    return keep


def test_documents_see_themselves_and_the_rest_sees_everything() -> None:
    bare = Bare(Shape(b=1, q=17, k=17))
    call = replace(bare.call, roles={"documents": SPANS})
    mask = BlockAttention().part(call.mask, call)
    assert isinstance(mask.rules[-1], Where)
    want = table(17, SPANS)
    assert torch.equal(tile_of(bare, mask)[0, 0], want)
    # a document's first token has itself alone; the last token of all has every key
    assert want[6].nonzero().flatten().tolist() == [6]
    assert want[13].nonzero().flatten().tolist() == [11, 12, 13]
    assert want[16].all()
    assert want[10].sum() == 11


def test_each_text_has_documents_of_its_own_and_padding_is_not_counted() -> None:
    text = torch.arange(17) >= torch.tensor([0, 3])[:, None]
    bare = Bare(Shape(q=17, k=17), text=text)
    other = ((0, 5),)
    call = replace(bare.call, roles={"facts": PerText((Region(SPANS), Region(other)))})
    keep = tile_of(bare, BlockAttention("facts").part(call.mask, call)).expand(2, 4, 17, 17)[:, 0]
    assert torch.equal(keep[0], table(17, SPANS))
    assert torch.equal(keep[1][3:], table(17, other, 3)[3:] & text[1])


def test_a_text_without_documents_is_read_as_ever() -> None:
    bare = Bare(Shape(q=9, k=9))
    call = replace(bare.call, roles={"documents": PerText((Region(()), Region(((0, 9),))))})
    keep = tile_of(bare, BlockAttention().part(call.mask, call)).expand(2, 4, 9, 9)
    assert torch.equal(keep[0, 0], torch.ones(9, 9).tril().bool())


def test_heads_are_softmax_over_what_they_see() -> None:
    bare = Bare(Shape(q=17, k=17), dtype=torch.float64)
    bare.call = replace(bare.call, roles={"documents": SPANS})
    k, v = (x.repeat_interleave(2, 1) for x in (bare.k, bare.v))
    scores = (bare.q @ k.mT / bare.shape.d**0.5).masked_fill(~table(17, SPANS), -torch.inf)
    assert close(bare.run(BlockAttention(), "tiled", 5)[0], scores.softmax(-1) @ v)


def turned(keys: torch.Tensor, by: int, rotary: torch.nn.Module) -> torch.Tensor:
    """Keys `[b g n d]` that stood at 0, 1, ... moved on by so many places."""
    cos, sin = rotary(keys, torch.full((1, keys.shape[2]), by))
    a, b = keys.chunk(2, -1)
    return keys * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


def test_is_what_documents_give_that_are_read_alone_and_turned() -> None:
    model = models.tiny("llama", num_hidden_layers=3)
    ids = models.tiny_inputs(model, 1, 20)["input_ids"]
    spans = ((0, 7), (7, 9), (9, 15))
    kept = DynamicCache()
    with torch.no_grad():
        for start, stop in spans:
            alone = cache_of(model(input_ids=ids[:, start:stop], use_cache=True))
            for n, layer in enumerate(alone.layers):
                kept.update(turned(layer.keys, start, model.model.rotary_emb), layer.values, n)
        want = model(input_ids=ids[:, 15:], **{CACHE: kept}, use_cache=True).logits
        plain = model(input_ids=ids).logits[:, 15:]
        with attach(model, BlockAttention(), roles={"documents": spans}) as run:
            got = run(input_ids=ids).logits[:, 15:]
    assert close_model(got, want)
    assert not close_model(plain, want)


def test_what_it_cannot_do_is_refused() -> None:
    bare = Bare(Shape(b=1, q=9, k=9))
    call = replace(bare.call, roles={"documents": ((4, 9), (0, 5))})
    with pytest.raises(FieldError, match=r"roles = \(\(4, 9\), \(0, 5\)\): must not overlap"):
        tile_of(bare, BlockAttention().part(call.mask, call))
    with pytest.raises(FieldError, match="has no spans named 'facts'"):
        BlockAttention("facts").part(call.mask, call)
    with pytest.raises(FieldError, match=r"role = '': must name a role"):
        BlockAttention("")


def test_it_leaves_cross_attention_alone() -> None:
    call = Bare().call
    assert BlockAttention().idle(replace(call, cross=True))
    assert not BlockAttention().idle(call)
    assert BlockAttention().role == "documents"
