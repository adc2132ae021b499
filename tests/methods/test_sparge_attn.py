"""SpargeAttn: the fewest blocks of the map of block means, and every block whose tokens are unlike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.core.errors import FieldError
from heedful.methods.sparse.prefill.sparge_attn import SpargeAttn
from tests.test_blocks import PADDED, call_of, grid_of


def _by_loops(q: Tensor, k: Tensor, size: int, tau: float, alike: float, sink: bool) -> Tensor:
    """One head of one causal text `[n d]`, block by block, as the authors' code reads."""
    k = k - k.mean(0)
    blocks = range(-(-len(q) // size))

    def part(x: Tensor, i: int) -> Tensor:
        return x[i * size : (i + 1) * size]

    def unlike(x: Tensor) -> bool:
        unit = x / x.norm(dim=-1, keepdim=True)
        return float((unit @ unit.T).mean()) <= alike

    table = torch.zeros(len(blocks), len(blocks), dtype=torch.bool)
    for i in blocks:
        seen = [j for j in blocks[: i + 1] if not unlike(part(k, j))]
        scores = torch.tensor([float(part(q, i).mean(0) @ part(k, j).mean(0)) for j in seen]) * q.shape[-1] ** -0.5
        weight = dict(zip(seen, scores.softmax(-1).tolist(), strict=True))
        total = 0.0
        for j in sorted(weight, key=lambda j: -weight[j]):
            table[i, j] = total < tau
            total += weight[j]
        for j in blocks[: i + 1]:
            table[i, j] |= unlike(part(q, i)) or unlike(part(k, j)) or (sink and j == 0)
        table[i, i] = True
    return table


@pytest.mark.parametrize(("tau", "alike", "sink"), [(0.6, -1.0, False), (0.9, 0.3, False), (0.6, 0.25, True)])
@pytest.mark.parametrize("text", [None, PADDED], ids=["plain", "padded"])
def test_the_formula(tau: float, alike: float, sink: bool, text: Tensor | None) -> None:
    bare = Bare(text=text)
    method = SpargeAttn(tau, alike, sink, block=4, most=1.0)
    (rule,) = method.skip(bare.call.mask, call_of(bare)).blocks
    for b, pad in enumerate((0, 0 if text is None else 5)):
        for h in range(4):
            wanted = _by_loops(bare.q[b, h, pad:], bare.k[b, h // 2, pad:], 4, tau, alike, sink)
            n = len(wanted)
            assert torch.equal(rule.table[b, h, :n, :n], wanted), (b, h)


def test_all_of_the_weight_is_every_block() -> None:
    bare = Bare()
    assert SpargeAttn(1.0, -1.0, block=4, most=0.99).skip(bare.call.mask, call_of(bare)) is bare.call.mask


def test_a_group_of_heads_is_not_one_head() -> None:
    bare = Bare(Shape(q=40, k=40))
    table = SpargeAttn(0.5, -1.0, block=4).choose(grid_of(bare, 4))
    assert not torch.equal(table[:, 0], table[:, 1])


@pytest.mark.parametrize("settings", [{"mass": 0.0}, {"mass": 1.1}, {"alike": 2.0}])
def test_wrong_fields_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(FieldError, match=f"SpargeAttn.{next(iter(settings))}"):
        SpargeAttn(**settings)


def test_blocks_whose_tokens_cancel_are_not_alike() -> None:
    x = torch.tensor([[[[[1.0, 2.0], [-1.0, -2.0]], [[1.0, 2.0], [2.0, 1.0]]]]])  # mean cosines 0 and 0.9
    is_text = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    for alike, wanted in ((0.0, [False, True]), (0.95, [False, False]), (-0.1, [True, True])):
        assert SpargeAttn(alike=alike).like(x, is_text).flatten().tolist() == wanted
