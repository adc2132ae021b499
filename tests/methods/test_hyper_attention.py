"""HyperAttention against the authors' recursion: block by block, draw by draw, and two estimates put together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Phase
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Padding
from heedful.methods.sparse.prefill.hyper_attention import HyperAttention
from tests.test_blocks import call_of

METHOD = HyperAttention(least=4, block=3, sample=5, bits=3, seed=7)
PADDED = torch.arange(33)[None] >= torch.tensor([[0], [4]])


def gray(bits: int) -> list[int]:
    """The authors' table."""
    if bits == 1:
        return [0, 1]
    half = gray(bits - 1)
    return half + [x + 2 ** (bits - 1) for x in reversed(half)]


def draws(method: HyperAttention, layer: int, d: int, heads: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(method.seed * 1_000_003 + layer)
    return torch.randn(d, method.bits, generator=draw), torch.rand(heads, method.sample, generator=draw)


def blocks(x: Tensor, directions: Tensor, size: int) -> list[int]:
    """The block of each of the vectors `[n d]`."""
    table, codes = gray(directions.shape[1]), []
    for row in x:
        signs = [float(row @ directions[:, i]) > 0 for i in range(directions.shape[1])]
        codes.append(table[sum(2**i for i, sign in enumerate(signs) if sign)])
    order = sorted(range(len(x)), key=lambda i: codes[i])
    place = {i: rank // size for rank, i in enumerate(order)}
    return [place[i] for i in range(len(x))]


def square(q: Tensor, k: Tensor, directions: Tensor, column: Tensor, method: HyperAttention) -> Tensor:
    """exp(score) of one square of one head, `[n m]`, as the authors estimate it."""
    weights = (q @ k.T * q.shape[1] ** -0.5).exp()
    if len(k) < method.least:
        return weights
    mine, theirs = blocks(q, directions, method.block), blocks(k, directions, method.block)
    drawn = [int(u * len(k)) for u in column.tolist()]
    out = torch.zeros_like(weights)
    for i in range(len(q)):
        for j in range(len(k)):
            if mine[i] == theirs[j]:
                out[i, j] = weights[i, j]
        for j in drawn:
            if mine[i] != theirs[j]:
                out[i, j] += len(k) / method.sample * weights[i, j]
    return out


def causal(q: Tensor, k: Tensor, directions: Tensor, column: Tensor, method: HyperAttention) -> Tensor:
    """exp(score) of one causal head, `[n n]`."""
    n = len(q)
    if n <= method.least:
        return (q @ k.T * q.shape[1] ** -0.5).exp().tril()
    half = (n + 1) // 2
    out = torch.zeros(n, n)
    out[:half, :half] = causal(q[:half], k[:half], directions, column, method)
    out[half:, half:] = causal(q[half:], k[half:], directions, column, method)
    out[half:, :half] = square(q[half:], k[:half], directions, column, method)
    return out


def texts(text: Tensor | None) -> Iterator[tuple[int, int]]:
    return enumerate((0, 0 if text is None else 4))


@pytest.mark.parametrize("text", [None, PADDED], ids=["plain", "padded"])
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_the_authors_recursion(text: Tensor | None, backend: str) -> None:
    bare = Bare(Shape(q=33, k=33), text=text, depth=2)
    heads, _ = bare.run(METHOD, backend, tile_rows=5 if backend == "tiled" else None)
    for b, pad in texts(text):
        for layer, h in product(range(2), range(4)):
            q, k, v = bare.q[b, h, pad:], bare.k[b, h // 2, pad:], bare.v[b, h // 2, pad:]
            directions, column = draws(METHOD, layer, 8, 4)
            weights = causal(q, k, directions, column[h], METHOD)
            assert close(heads[b, 4 * layer + h, pad:], weights / weights.sum(-1, keepdim=True) @ v), (b, layer, h)
            assert (weights == 0).sum() > 33 * 32 / 2, "some pairs below the diagonal are left out"


@pytest.mark.parametrize("text", [None, PADDED, PADDED.flip(1)], ids=["plain", "left", "right"])
def test_a_text_that_is_seen_as_a_whole_is_one_square(text: Tensor | None) -> None:
    bare = Bare(Shape(q=33, k=33), text=text, rules=() if text is None else (Padding(text),))
    heads, _ = bare.run(METHOD, "reference")
    for b in range(2):
        own = slice(None) if text is None else text[b]
        for h in range(4):
            q, k, v = bare.q[b, h, own], bare.k[b, h // 2, own], bare.v[b, h // 2, own]
            directions, column = draws(METHOD, 0, 8, 4)
            weights = square(q, k, directions, column[h], METHOD)
            assert close(heads[b, h, own], weights / weights.sum(-1, keepdim=True) @ v), (b, h)
            assert (weights.triu(1) == 0).sum() > len(q) * (len(q) - 1) / 2 + 10, "some pairs above it are left out"


def test_a_short_text_that_is_seen_as_a_whole_is_exact() -> None:
    for n, squares in ((3, 0), (4, 1)):
        call = call_of(Bare(Shape(q=n, k=n), rules=()))
        assert len(list(METHOD.squares(call))) == 2 * squares
        assert METHOD.idle(call) is not bool(squares)


@torch.no_grad()
def test_empty_places_of_a_static_cache_are_no_text() -> None:
    model, ids = models.tiny("llama"), torch.arange(3, 36)[None]
    with attach(model, METHOD) as run:
        wanted = run(input_ids=ids).logits
        found = run(input_ids=ids, **{CACHE: StaticCache(model.config, max_cache_len=40)}).logits
    assert close_model(found, wanted)
    assert not close_model(found, model(input_ids=ids).logits)


def test_layers_draw_anew_and_seeds_too() -> None:
    bare = Bare(Shape(q=33, k=33))

    def found(method: HyperAttention, layer: int) -> Tensor:
        (first, *_) = method.squares(replace(call_of(bare), layer=layer))
        return first.extra

    assert not torch.equal(found(METHOD, 0), found(METHOD, 1))
    assert not torch.equal(found(METHOD, 0), found(replace(METHOD, seed=8), 0))
    assert torch.equal(found(METHOD, 1), found(METHOD, 1))
    assert (found(METHOD, 0) > -torch.inf).any(-1).all()


def test_without_a_sample_only_blocks_are_left() -> None:
    bare = Bare(Shape(q=33, k=33))
    (first, *_) = replace(METHOD, sample=0).squares(call_of(bare))
    assert (first.extra == -torch.inf).all()


@pytest.mark.parametrize(
    ("n", "squares"),
    [(6, []), (7, [(0, 4, 7)]), (8, [(0, 4, 8)]), (9, [(0, 5, 9)]), (16, [(0, 8, 16), (0, 4, 8), (8, 12, 16)])],
)
def test_what_is_small_is_exact(n: int, squares: list[tuple[int, int, int]]) -> None:
    """As in the authors' code: halves of more than `least` tokens, squares of as many or more."""
    assert list(METHOD.halves(0, n)) == squares
    call = Bare(Shape(q=n, k=n)).call
    assert METHOD.idle(call) is not bool(squares)
    told = f"squares of fewer than 4 queries are exact, and the text has {n}: a smaller least would act"
    assert METHOD.rests(n) == (None if squares else told)


def test_decoding_and_later_chunks_are_exact() -> None:
    whole = Bare(Shape(q=33, k=33)).call
    assert not METHOD.idle(whole)
    assert METHOD.idle(replace(whole, phase=Phase.DECODE))
    assert METHOD.idle(replace(whole, cross=True))
    assert METHOD.idle(Bare(Shape(q=32, k=33)).call)


def test_a_text_among_longer_ones_may_be_exact() -> None:
    text = torch.arange(33)[None] >= torch.tensor([[0], [27]])
    bare = Bare(Shape(q=33, k=33), text=text)
    assert {square.text for square in METHOD.squares(call_of(bare))} == {0}
    nobody = Bare(Shape(q=33, k=33), text=torch.zeros(2, 33, dtype=torch.bool))
    assert METHOD.choose(nobody.call.mask, call_of(nobody)) is nobody.call.mask


@pytest.mark.parametrize("name", ["least", "block", "sample", "bits"])
def test_wrong_fields_are_refused(name: str) -> None:
    with pytest.raises(FieldError, match=rf"HyperAttention\.{name} = -1: must be"):
        HyperAttention(**{name: -1})


def test_nothing_to_hash_is_an_error() -> None:
    with pytest.raises(SiteError, match="hashes queries and keys, and is handed none"):
        list(METHOD.squares(Bare().call))


def test_the_smallest_parts_are_single_tokens() -> None:
    assert list(HyperAttention(least=1).halves(3, 6)) == [(3, 5, 6), (3, 4, 5)]


def test_a_vector_without_direction_has_no_sign() -> None:
    directions = torch.tensor([[1.0, -1.0, 1.0], [0.0, 1.0, -1.0]])
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # signs 000, 101 and 010, the first bit the lowest
    assert HyperAttention.hash(x, directions).tolist() == [gray(3)[0], gray(3)[5], gray(3)[2]]
