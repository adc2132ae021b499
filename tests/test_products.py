"""The products of a tile: shared out among threads, and scores scaled as models scale them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import reads
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.method import Method, Stack
from heedful.core.sites import Site
from heedful.core.stats import Sum
from heedful.engine.attend import attend, grouped
from heedful.engine.attention_call import AttentionCall
from heedful.engine.run_state import RunState
from heedful.engine.select import select

from .samples import PAPER


@pytest.mark.parametrize("threads", [1, 2, 4, 5])
@pytest.mark.parametrize("size", [(1, 9, 3, 56), (1, 9, 9, 64), (2, 6, 3, 33), (1, 4, 4, 7)])
def test_threads_share_products_that_are_the_same(threads: int, size: tuple[int, ...]) -> None:
    (b, h, g, rows), before = size, torch.get_num_threads()
    q, k = torch.randn(b, h, rows, 64), torch.randn(b, g, 40, 64)
    out = torch.full((b, h, rows, 40), torch.nan)
    torch.set_num_threads(threads)
    try:
        found = grouped(q, k.mT, out)
    finally:
        torch.set_num_threads(before)
    assert found.data_ptr() == out.data_ptr()
    assert close(found, (q.double() @ k.double().mT.repeat_interleave(h // g, 1)).float())


class Seen(Method):
    """Keeps the scores as they come."""

    paper = PAPER

    @reads(Site.SCORES)
    def look(self, scores: Tensor, call: Call) -> Sum:
        return Sum.of(scores.clone())


@pytest.mark.parametrize("scale", [0.125, 1.0, 0.3, 12**-0.5])
def test_scores_are_scaled_after_the_product_to_the_bit(scale: float) -> None:
    bare = Bare(Shape(q=40, k=40, d=12))
    run_state = RunState(Stack((Seen(),)))
    run_state.new_forward()
    call = replace(bare.call, scale=scale)
    plan = run_state.plan(call)
    attend(AttentionCall(plan, run_state, call), bare.q, bare.k, bare.v, lambda needs: select("reference", needs))
    run_state.close_call(plan, call)
    (found,) = run_state.statistics.values()
    assert torch.equal(found.value, grouped(bare.q, bare.k.mT) * scale)
