"""Whatever a step is handed it leaves as it was, at every site; the answer alone is what changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, edit, models
from heedful.core.call import CachedKV, Call
from heedful.core.errors import SiteError
from heedful.core.method import Method
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Sum

from .samples import PAPER

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


class Block(Method):
    paper = PAPER
    dirty: bool = True

    @at(Site.BLOCK)
    def block(self, hidden: Tensor, call: Call) -> Tensor:
        return hidden.mul_(3) if self.dirty else hidden * 3


class Mix(Method):
    """With the values, which a cache may hold."""

    paper = PAPER
    dirty: bool = True

    @at(Site.MIX)
    def mix(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        v = qkv[2].mul_(3) if self.dirty else qkv[2] * 3
        return call.spread(v)


class Shrink(Method):
    paper = PAPER
    dirty: bool = True

    @at(Site.CACHE)
    def shrink(self, entries: CachedKV, call: Call) -> Tensor:
        if self.dirty:
            entries.value.mul_(3)
        return entries.is_filled & (entries.positions.index > 0)


class Look(Method):
    """Reads, and should do no more."""

    paper = PAPER
    dirty: bool = True

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Sum:
        return Sum.of((weights.mul_(3) if self.dirty else weights * 3).sum())


class Soft(Method):
    """Normalises, and should leave scores for whoever normalises other heads."""

    paper = PAPER
    dirty: bool = True

    @at(Site.NORMALISE)
    def soft(self, scores: Tensor, call: Call) -> Tensor:
        return (scores.mul_(3) if self.dirty else scores * 3).softmax(-1)


@modes
@pytest.mark.parametrize("kind", [Block, Mix, Shrink, Look, Soft])
def test_a_change_in_place_is_an_error(kind: Any, mode: Any) -> None:
    model = models.tiny("llama").eval()
    with mode():
        with attach(model, kind(dirty=False)) as run:
            for _ in range(2):
                run(input_ids=IDS, use_cache=True)
        run = attach(model, kind())
        with pytest.raises(SiteError, match="changed its input in place"):
            run(input_ids=IDS, use_cache=True)
        run.close()


def test_it_is_the_same_error_where_torch_sees_it_first() -> None:
    def first_away(weights: Tensor, call: Call) -> Tensor:
        weights[:, 0] = 0  # a view, which torch lets nobody change where there are gradients
        return weights

    def own(weights: Tensor, call: Call) -> Tensor:
        return torch.zeros(2, requires_grad=True).mul_(2)

    model = models.tiny("llama").eval()
    for function, kind, message in (
        (first_away, SiteError, "PATTERN, layer 0: changed its input in place"),
        (own, RuntimeError, "a leaf Variable"),
    ):
        run = attach(model, edit(Site.PATTERN, function))
        with pytest.raises(kind, match=message):
            run(input_ids=IDS)
        run.close()
