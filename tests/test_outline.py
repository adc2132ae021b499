"""What a call says before its queries are known is what it says afterwards, with a mask of the model's own too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.sites import Site, at

from .samples import PAPER

IDS = torch.randint(3, 100, (2, 14), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing")


class Says(Method):
    """Changes nothing, and remembers what calls say at three sites."""

    paper = PAPER

    def _note(self, x: Tensor, call: Call) -> Tensor:
        said = (call.phase.name, call.q_pos[0, 0].tolist(), len(call.keys))
        call.state.run.setdefault("said", []).append(said)
        return x

    @at(Site.EMBEDDING)
    def embedding(self, x: Tensor, call: Call) -> Tensor:
        return self._note(x, call)

    @at(Site.HIDDEN)
    def hidden(self, x: Tensor, call: Call) -> Tensor:
        return self._note(x, call)

    @at(Site.QUERY)
    def query(self, x: Tensor, call: Call) -> Tensor:
        return self._note(x, call)


def table(start: int, stop: int) -> Tensor:
    """A mask that the caller makes himself, `[2 1 q k]`."""
    keep = torch.arange(stop) <= torch.arange(start, stop)[:, None]
    return torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min).expand(2, 1, -1, -1)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_site_of_a_call_says_the_same(implementation: str, own: bool) -> None:
    model: Any = models.tiny("llama", attn_implementation=implementation).eval()
    cache = None
    with attach(model, Says()) as run, torch.no_grad():
        for start, stop in ((0, 12), (12, 13), (13, 14)):
            more = {"attention_mask": table(start, stop)} if own else {}
            out = run(input_ids=IDS[:, start:stop], use_cache=True, **{CACHE: cache}, **more)
            cache = out[CACHE]
        said = [call for _, kept in sorted(run.state._of_run.items()) for call in kept["said"]]
    first = [("PREFILL", list(range(12)), 12), ("DECODE", [12], 13), ("DECODE", [13], 14)]
    assert said == [x for x in first for _ in range(3)] + [x for x in first for _ in range(2)]


@torch.no_grad()
def test_what_is_for_decoding_acts_there_under_a_mask_of_the_callers_own() -> None:
    class Push(Method):
        paper = PAPER

        @at(Site.HIDDEN)
        def push(self, x: Tensor, call: Call) -> Tensor:
            return x * 2

    model: Any = models.tiny("llama").eval()
    with attach(model, Push().when("decode")) as run:
        found = []
        for own in (True, False):
            cache = run(input_ids=IDS[:, :12], use_cache=True)[CACHE]
            more = {"attention_mask": table(12, 13)} if own else {}
            found.append(run(input_ids=IDS[:, 12:13], use_cache=True, **{CACHE: cache}, **more).logits)
        torch.testing.assert_close(*found)
        assert run.active
