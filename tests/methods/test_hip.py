"""HiP: the authors' tree search, branch by branch, and what a block of queries sees."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.core.errors import FieldError
from heedful.methods.sparse.prefill.hip import HiP
from tests.test_blocks import LONG, call_of


def search(q: Tensor, k: Tensor, keep: int, leaf: int) -> list[int]:
    """The keys that one block of queries `[n d]` chooses among `k [m d]`, which lies before its window."""
    if len(k) <= keep:
        return list(range(len(k)))
    leaves, nodes = math.ceil(len(k) / leaf), keep // leaf
    branches = [(leaves * i // nodes, leaves * (i + 1) // nodes) for i in range(nodes)]
    size = leaves / nodes
    while size > 1:
        halves = []
        for start, stop in branches:
            middle = start + (stop - start) // 2
            halves += [(a, b) for a, b in ((start, middle), (middle, stop)) if a < b]
        halves.sort(key=lambda x: -max(float(a @ b) for a in q for b in k[x[0] * leaf : (x[0] + 1) * leaf]))
        branches = halves[:nodes]
        size /= 2
    return [j for start, _ in branches for j in range(start * leaf, (start + 1) * leaf)]


def by_loops(q: Tensor, k: Tensor, method: HiP) -> Tensor:
    """One head of one causal text: queries `[n d]` are the last of the keys `[m d]`."""
    n, ahead = len(q), len(k) - len(q)
    table = torch.zeros(n, len(k), dtype=torch.bool)
    for start in range(0, n, method.block):
        stop = min(start + method.block, n)
        far = max(0, ahead + stop - method.window)
        # a leaf may reach into the window
        chosen = search(q[start:stop], k[: far + -far % method.leaf] if far > method.keep else k[:far], method.keep,
                        method.leaf)  # fmt: skip
        for i in range(start, stop):
            for j in range(ahead + i + 1):
                table[i, j] = j in chosen or j >= far or j < method.sinks
    return table


def found(bare: Bare, method: HiP) -> Tensor:
    call, shape = call_of(bare), bare.shape
    kept = method.narrow(call.mask, call).keeps(call.tile(slice(0, shape.q), slice(0, shape.k)).pairs)
    assert kept is not None
    return kept.expand(shape.b, shape.h, -1, -1)


METHODS = [
    HiP(keep=8, leaf=2, window=4, sinks=1, block=3),
    HiP(keep=4, leaf=1, window=0, sinks=0, block=5),
    HiP(keep=12, leaf=4, window=16, sinks=2, block=16),
    HiP(keep=1, leaf=1, window=2, sinks=0, block=1),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", [None, LONG[:, :70]], ids=["plain", "padded"])
def test_the_tree(method: HiP, text: Tensor | None) -> None:
    bare = Bare(Shape(q=70, k=70), text=text)
    kept = found(bare, method)
    for b, pad in enumerate((0, 0 if text is None else 5)):
        for h in range(4):
            wanted = by_loops(bare.q[b, h, pad:], bare.k[b, h // 2, pad:], method)
            assert torch.equal(kept[b, h, pad:, pad:], wanted), (b, h)


@pytest.mark.parametrize("n", [1, 7])
def test_what_comes_later_has_a_tree_too(n: int) -> None:
    bare, method = Bare(Shape(q=n, k=60)), METHODS[0]
    kept = found(bare, method)
    for h in range(4):
        assert torch.equal(kept[1, h], by_loops(bare.q[1, h], bare.k[1, h // 2], method))
    assert not method.idle(bare.call)


def test_a_tree_finds_the_best_key_where_its_branch_looks_alike() -> None:
    """Only keys 40 to 47 are wanted: their branches' first blocks show it at every level."""
    bare = Bare(Shape(b=1, h=1, g=1, q=65, k=65))
    bare.q = torch.ones_like(bare.q)
    bare.k = torch.zeros_like(bare.k)
    bare.k[:, :, 40:48] = 1.0
    kept = found(bare, HiP(keep=8, leaf=1, window=1, sinks=0, block=1))
    assert kept[0, 0, 64].nonzero().flatten().tolist() == [*range(40, 48), 64]


def test_the_last_key_is_found_too() -> None:
    """Without a window: the first key of each half leads to it."""
    bare = Bare(Shape(b=1, h=1, g=1, q=65, k=65))
    bare.q = torch.ones_like(bare.q)
    bare.k = torch.zeros_like(bare.k)
    bare.k[:, :, [32, 48, 56, 60, 62, 63, 64]] = torch.arange(1.0, 8.0)[:, None]
    kept = found(bare, HiP(keep=1, leaf=1, window=0, sinks=0, block=1))
    assert kept[0, 0, 64].nonzero().flatten().tolist() == [64]


def test_a_short_text_is_left_as_it_is() -> None:
    method = HiP(keep=8, window=4)
    assert method.rests(12) == "there is room for 12 tokens, and the text has 12: a smaller keep or window would act"
    assert method.rests(13) is None
    assert method.idle(Bare(Shape(q=12, k=12)).call)
    assert not method.idle(Bare(Shape(q=13, k=13)).call)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"leaf": 0}, r"HiP\.leaf = 0: must be 1"),
        ({"keep": 5}, r"HiP\.keep = 5: must be a multiple of the leaf of 2 keys.*4"),
        ({"keep": 0}, r"HiP\.keep = 0.*2"),
        ({"window": -1}, r"HiP\.window.*256"),
        ({"sinks": -1}, r"HiP\.sinks.*16"),
        ({"block": 0}, r"HiP\.block"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, int], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        HiP(**settings)
