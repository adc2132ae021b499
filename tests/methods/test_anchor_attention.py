"""AnchorAttention: keys that come within theta of the mean anchor, told one by one as the authors' plain code reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.core.errors import FieldError
from heedful.core.mask import Causal, First, Window
from heedful.methods.sparse.prefill.anchor_attention import AnchorAttention
from tests.test_blocks import PADDED, call_of


def by_loops(q: Tensor, k: Tensor, size: int, step: int, theta: float) -> Tensor:
    """One head of one causal text: queries `[n d]` are the last of the keys `[m d]`."""
    n, ahead, scale = len(q), len(k) - len(q), q.shape[1] ** -0.5
    table = torch.zeros(n, len(k), dtype=torch.bool)
    for group in range(0, n, size * step):
        rows = range(group, min(group + size * step, n))
        begin = ahead + group
        chosen = set(range(size)) | set(range(begin, len(k)))
        for block in range(group, rows[-1] + 1, size):
            part = range(block, min(block + size, n))
            anchors = []
            for i in part:
                near = [j for j in range(ahead + i + 1) if j < size or j >= begin]
                anchors.append(max(float(q[i] @ k[j]) * scale for j in near))
            anchor, mean = sum(anchors) / len(anchors), q[part[0] : part[-1] + 1].mean(0)
            chosen |= {j for j in range(len(k)) if float(mean @ k[j]) * scale + theta >= anchor}
        for i in rows:
            for j in chosen:
                table[i, j] = j <= ahead + i
    return table


def found(bare: Bare, method: AnchorAttention) -> Tensor:
    call = call_of(bare)
    shape = bare.shape
    every = call.tile(slice(0, shape.q), slice(0, shape.k)).pairs
    kept = method.narrow(call.mask, call).keeps(every)
    assert kept is not None
    return kept.expand(shape.b, shape.h, -1, -1)


@pytest.mark.parametrize(("size", "step", "theta"), [(3, 2, -0.5), (4, 1, 0.5), (2, 3, -1.0), (2, 1, 1.5)])
@pytest.mark.parametrize("text", [None, PADDED], ids=["plain", "padded"])
def test_the_formula(size: int, step: int, theta: float, text: Tensor | None) -> None:
    bare = Bare(text=text)
    kept = found(bare, AnchorAttention(theta, step, block=size))
    for b, pad in enumerate((0, 0 if text is None else 5)):
        for h in range(4):
            wanted = by_loops(bare.q[b, h, pad:], bare.k[b, h // 2, pad:], size, step, theta)
            assert torch.equal(kept[b, h, pad:, pad:], wanted), (b, h)
            assert not wanted.equal(torch.ones_like(wanted).tril())


def test_a_later_chunk_counts_its_groups_from_its_first_query() -> None:
    bare = Bare(Shape(q=9, k=25))
    kept = found(bare, AnchorAttention(-0.5, 2, block=2))
    for h in range(4):
        assert torch.equal(kept[0, h], by_loops(bare.q[0, h], bare.k[0, h // 2], 2, 2, -0.5))


def test_a_narrower_mask_hides_keys_from_the_anchor() -> None:
    """With a window of one token a query's anchor is its own key's score, and what it may not see stays unseen."""
    bare = Bare(Shape(b=1, h=1, g=1), rules=(Causal(), Window(1)))
    kept = found(bare, AnchorAttention(0.0, 1, block=2))
    assert torch.equal(kept[0, 0], torch.eye(19, dtype=torch.bool))
    wide = Bare(Shape(b=1, h=1, g=1), rules=(Causal(), Window(6)))
    kept, q, k = found(wide, AnchorAttention(0.0, 1, block=2)), wide.q[0, 0], wide.k[0, 0]
    scores = q @ k.T * 8**-0.5
    for block in range(0, 18, 2):
        anchors = [max(float(scores[i, j]) for j in range(max(0, i - 5), i + 1) if j < 2 or j >= block)
                   for i in (block, block + 1)]  # fmt: skip
        near = q[block : block + 2].mean(0) @ k.T * 8**-0.5 >= sum(anchors) / 2
        for i in (block, block + 1):
            for j in range(max(0, i - 5), i + 1):
                assert bool(kept[0, 0, i, j]) is (j < 2 or j >= block or bool(near[j]))


def test_keys_that_are_seen_in_two_stretches() -> None:
    """The first two keys and the last three: what lies between is no anchor, though it may score higher."""
    bare = Bare(Shape(b=1, h=1, g=1), rules=(Causal(), First(2) | Window(3)))
    kept, q, k = found(bare, AnchorAttention(0.0, 1, block=4)), bare.q[0, 0], bare.k[0, 0]
    scores = q @ k.T * 8**-0.5
    for block in range(0, 19, 4):
        rows = range(block, min(block + 4, 19))
        seen = {i: [j for j in range(i + 1) if j < 2 or j > i - 3] for i in rows}
        anchor = sum(max(float(scores[i, j]) for j in seen[i] if j < 4 or j >= block) for i in rows) / len(rows)
        mean = q[rows[0] : rows[-1] + 1].mean(0) @ k.T * 8**-0.5
        for i in rows:
            wanted = [j for j in seen[i] if j < 4 or j >= block or float(mean[j]) >= anchor]
            assert kept[0, 0, i].nonzero().flatten().tolist() == wanted


def test_a_key_at_the_edge_is_near_enough() -> None:
    above, sure = torch.tensor([[[-1.0, -1.5, -1.5]]]), torch.tensor([False, False, True])
    assert AnchorAttention(1.0).near_enough(above, sure).tolist() == [[[True, False, True]]]


def test_a_short_text_is_left_as_it_is() -> None:
    method = AnchorAttention(step=2, block=4)
    told = "the first block and a group of queries hold 12 tokens, and the text has 12: a smaller block would act"
    assert method.rests(12) == told
    assert method.rests(13) is None
    bare = Bare(Shape(q=12, k=12))
    assert method.narrow(bare.call.mask, call_of(bare)) is bare.call.mask
    assert AnchorAttention(block=12).idle(bare.call)
    assert not AnchorAttention(block=11).idle(bare.call)


@pytest.mark.parametrize("settings", [{"step": 0}, {"block": 0}])
def test_wrong_fields_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(FieldError, match=f"AnchorAttention.{next(iter(settings))} = 0: must be 1 or more"):
        AnchorAttention(**settings)
