"""How large tiles are, and what of them is not computed."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import Method, Site
from heedful.authoring import at
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.stats import Sum
from heedful.core.summary import Summary, sums
from heedful.engine import attend
from heedful.engine.backends import tiled
from heedful.methods import ClippedSoftmax

from .samples import PAPER, Scale

TOKENS = 64
LEAST = torch.finfo(torch.float32).min


class Halved(Method):
    """Half of the weights."""

    paper = PAPER

    @at(Site.NORMALISE)
    def halve(self, scores: Tensor, call: Call) -> Tensor:
        return scores.softmax(-1) / 2


class Fourth(Method):
    """One score for all that the token at 4 sees, and what tokens receive."""

    paper = PAPER
    score: float

    @at(Site.SCORES)
    def level(self, scores: Tensor, call: Call) -> Tensor:
        return scores.where(call.q_pos[..., None] != 4, self.score)

    @sums("received")
    def weigh(self, pattern: Summary, call: Call) -> Sum:
        assert pattern.received is not None
        return Sum.of(pattern.received.sum(0))


def test_tiles_are_smaller_where_steps_or_the_way_back_hold_many_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiled.Tiled().tile_rows(1, 2, 8192) == 2 * tiled.Tiled().tile_rows(1, 2, 8192, smaller=True) == 128
    made: list[int] = []
    own = tiled.Tiled.block

    def counted(self: tiled.Tiled, job: object, rows: slice, **more: Tensor) -> Tensor:
        made.append(rows.stop - rows.start)
        return own(self, job, rows, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(tiled.Tiled, "block", counted)
    bare = Bare(Shape(b=1, h=2, g=2, q=TOKENS, k=TOKENS), rules=())
    monkeypatch.setattr(tiled, "TILE_BYTES", 4 * 2 * TOKENS * 32)
    bare.run(Scale(), "tiled")
    assert made == [32, 32]
    made.clear()
    bare.run(Halved(), "tiled")
    assert made == [16] * 4
    made.clear()
    monkeypatch.setattr(tiled, "KEPT_BYTES", 0)
    bare.q.requires_grad_()
    bare.run(Scale(), "tiled")
    assert made == [16] * 4


def test_no_softmax_is_made_where_a_step_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    own = attend.softmax

    def counted(scores: Tensor, *more: Tensor | None) -> Tensor:
        made.append(scores.requires_grad)
        return own(scores, *more)

    monkeypatch.setattr(attend, "softmax", counted)
    bare = Bare(Shape(q=TOKENS, k=TOKENS))
    bare.q.requires_grad_()
    whole = bare.run(Scale(1.0), "tiled", tile_rows=16)[0]
    assert made == [True] * 4
    made.clear()
    assert close(bare.run(Halved(), "tiled", tile_rows=16)[0], whole / 2)
    assert made == [False]  # to see whether the step changes anything, and not to learn from
    made.clear()
    bare.run(ClippedSoftmax(0.0), "tiled", tile_rows=16)  # one that changes nothing is compared with it for good
    assert made == [False] * 4


@pytest.mark.parametrize("score", [1.0, LEAST], ids=["plain", "as low"])
def test_hidden_weights_are_made_zeros_where_softmax_did_not(monkeypatch: pytest.MonkeyPatch, score: float) -> None:
    looked: list[Tensor] = []
    own = attend.zeroed

    def counted(weights: Tensor, *more: Tensor, **settings: Any) -> Tensor:
        looked.append(weights)
        return own(weights, *more, **settings)

    monkeypatch.setattr(attend, "zeroed", counted)
    bare = Bare(Shape(q=TOKENS, k=TOKENS))
    found = bare.run(Fourth(score), "tiled", tile_rows=16)[1]["weigh, layer 0"].value
    assert len(looked) == (score == LEAST)  # in the one tile where a row saw nothing
    scores = bare.q @ bare.call.spread(bare.k).mT * bare.call.scale
    scores[:, :, 4] = 1.0
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    told = scores.masked_fill(~seen, -math.inf).softmax(-1).sum((0, 2))
    assert close(found[:, 5:], told[:, 5:])  # of later tokens, to which the row gives nothing


class Uncertain(Method):
    """Adds up the entropy of every row."""

    paper = PAPER

    @sums("entropy")
    def weigh(self, pattern: Summary, call: Call) -> Sum:
        assert pattern.entropy is not None
        return Sum.of(pattern.entropy.sum(0))


@pytest.mark.parametrize("top", [math.nan, math.inf, -math.inf, LEAST, -LEAST])
def test_a_row_without_numbers_may_have_any_weights(top: float) -> None:
    assert attend._above_hidden(torch.tensor([0.0, 1e30]))
    assert not attend._above_hidden(torch.tensor([0.0, top]))


ASKED = """
import ctypes, torch
from heedful.engine.backends import tiled

class Told(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]

system, held = ctypes.CDLL(None).mallinfo, []
system.restype = Told

def asked():  # how many pieces of the system's own a large one takes; what is given back would change that
    before = system().hblks
    held.append(torch.empty(tiled.ROOM_BYTES - 2**20, dtype=torch.uint8))
    return system().hblks - before

print(asked())
with torch.device("meta"):
    tiled._hold_on()
print(asked())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have ways of their own")
def test_maps_of_a_tile_are_asked_of_the_system_no_more() -> None:
    told = subprocess.run([sys.executable, "-c", ASKED], check=True, capture_output=True, text=True).stdout
    assert told.split() == ["1", "0"]
