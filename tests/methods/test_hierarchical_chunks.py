"""HierarchicalChunks against an encoder that is run on each chunk by itself, and loops over pairs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heedful import attach, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods import HierarchicalChunks
from tests.samples import within

N = 19


def sees(i: int, j: int, chunk: int, meet: bool, pad: int = 0) -> bool:
    """Whether the token at index i computes the key at index j, in a text that begins behind padding."""
    i, j = i - pad, j - pad
    together = [p for p in range(0, N, chunk) if p <= i < p + chunk] == [
        p for p in range(0, N, chunk) if p <= j < p + chunk
    ]
    return together or (meet and i % chunk == 0 and j % chunk == 0)


@pytest.mark.parametrize("chunk", [1, 4, 19])
@pytest.mark.parametrize(("layer", "meet"), [(0, False), (2, False), (3, True), (4, True)])
def test_chunks_see_themselves_and_first_tokens_meet_late(chunk: int, layer: int, meet: bool) -> None:
    bare = Bare(Shape(b=1, q=N, k=N), rules=())
    call = within(bare.call, layer, 5)
    keep = HierarchicalChunks(chunk, 2).part(call.mask, call).keeps(call.tile(slice(0, N), slice(0, N)).pairs)
    assert keep is not None
    want = torch.tensor([[sees(i, j, chunk, meet) for j in range(N)] for i in range(N)])
    assert torch.equal(keep.expand(1, 4, N, N)[0, 1], want)


def test_padding_does_not_count() -> None:
    bare = Bare(Shape(q=N, k=N), rules=(), text=torch.arange(N) >= torch.tensor([0, 3])[:, None])
    keep = (
        HierarchicalChunks(4, 1).part(bare.call.mask, bare.call).keeps(bare.call.tile(slice(0, N), slice(0, N)).pairs)
    )
    assert keep is not None
    for text, pad in ((0, 0), (1, 3)):
        want = torch.tensor([[sees(i, j, 4, True, pad) for j in range(pad, N)] for i in range(pad, N)])
        assert torch.equal(keep.expand(2, 4, N, N)[text, 0, pad:, pad:], want)


def test_heads_are_softmax_over_what_they_see() -> None:
    bare = Bare(Shape(b=1, q=N, k=N), rules=(), dtype=torch.float64)
    k, v = (x.repeat_interleave(2, 1) for x in (bare.k, bare.v))
    seen = torch.tensor([[sees(i, j, 5, True) for j in range(N)] for i in range(N)])
    scores = (bare.q @ k.mT / bare.shape.d**0.5).masked_fill(~seen, -torch.inf)
    assert close(bare.run(HierarchicalChunks(5, 1), "tiled", 4)[0], scores.softmax(-1) @ v)


def test_without_a_second_level_each_chunk_is_read_as_if_alone() -> None:
    model = models.tiny("llama", num_hidden_layers=3)
    ids = models.tiny_inputs(model, 1, 10)["input_ids"]
    with torch.no_grad():
        want = torch.cat([model(input_ids=ids[:, i : i + 4]).logits for i in (0, 4, 8)], 1)  # rotary: places cancel
        plain = model(input_ids=ids).logits
        with attach(model, HierarchicalChunks(4, 0)) as run:
            got = run(input_ids=ids).logits
    assert close_model(got, want)
    assert not close_model(plain, want)


def test_what_is_declared_and_refused() -> None:
    method = HierarchicalChunks()
    assert (method.chunk, method.levels) == (128, 2)
    assert "chunk=32" in str(method.rests(128))
    assert method.rests(129) is None
    for bad in ({"chunk": 0}, {"levels": -1}):
        with pytest.raises(FieldError, match=rf"HierarchicalChunks\.{next(iter(bad))}"):
            HierarchicalChunks(**bad)
    assert HierarchicalChunks(1, 0).levels == 0
    call = Bare().call
    assert HierarchicalChunks(18).idle(replace(call, cross=True))
    assert not HierarchicalChunks(18).idle(call)
    assert HierarchicalChunks(19).idle(call)  # 19 tokens are one chunk
