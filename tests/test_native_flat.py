"""The native kernel's decode step over heads of unlike length, read where they lie, without a padded copy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.conformance.tolerances import close, within_budget
from heedful.core.call import Call
from heedful.core.mask import Blocks, First, Mask, Rule, Where, Window
from heedful.core.method import Method
from heedful.core.positions import Positions
from heedful.core.ragged import Ragged, padded, spread
from heedful.core.sites import Site, at
from heedful.core.stats import Statistic
from heedful.core.summary import Summary, sums
from heedful.core.values import replace

from .kernel_calls import CAUSAL, Same, run
from .samples import PAPER
from .test_native import pytestmark

__all__ = ["pytestmark"]  # these tests too need a kernel


class Columns(Method):
    """Asks for what can be told where keys were dropped."""

    paper = PAPER
    seen: list[Summary]

    @sums("received", "entropy", "peak")
    def look(self, pattern: Summary, call: Call) -> Statistic | None:
        self.seen.append(pattern)
        return None


def flat_step(
    counts: tuple[int, ...], heads: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Call]:
    """One query of each of two texts, after keys of heads of unlike length."""
    h, g = heads
    made = torch.Generator().manual_seed(3)
    q = torch.randn(2, h, 1, 24, generator=made).to(dtype)
    flat = torch.randn(sum(counts), 24, generator=made).to(dtype)
    k, v = spread(flat, (2, g), counts), spread(flat[:, :20].neg(), (2, g), counts)
    longest, held = max(counts), torch.tensor(counts).view(2, g)
    index = torch.arange(longest).expand(2, g, -1)
    there = Positions(index, index, is_filled=index >= longest - held[..., None], last=longest - 1, filled=held)
    return q, k, v, Call(0, 1, "bare", h, g, Positions.row(longest, 1), there, 0.2, mask=Mask(CAUSAL))


UNEVEN = [(40, 1300, 0, 7), (1300, 788, 787, 789), (512, 513, 1, 1024), (0, 0, 3, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (10, 2)])
@pytest.mark.parametrize("counts", UNEVEN, ids=str)
def test_heads_of_unlike_length_are_read_where_they_lie(
    counts: tuple[int, ...], heads: tuple[int, int], dtype: torch.dtype
) -> None:
    q, k, v, call = flat_step(counts, heads, dtype)
    found = run("native", Same(), q, k, v, call)
    assert isinstance(k, Ragged)
    assert isinstance(v, Ragged)
    assert k._whole is None, "nothing was padded"
    assert v._whole is None
    assert torch.equal(found, run("native", Same(), q, padded(k), padded(v), call))
    wide = [x.double() for x in (q, k, v)]
    assert within_budget(found, run("reference", Same(), q, k, v, call), run("reference", Same(), *wide, call))
    groups = found.view(2, heads[1], -1)
    assert groups.any(-1).flatten().tolist() == [n > 0 for n in counts], "a head that holds nothing gives nothing"


@pytest.mark.parametrize("rules", [(), (Window(300),), (Window(600) | First(9),), (Where(lambda q, k: k % 700 > 300),)])
def test_rules_hold_where_heads_lie_flat(rules: tuple[Rule, ...]) -> None:
    q, k, v, call = flat_step((900, 1300, 640, 7), (6, 2))
    call = replace(call, mask=Mask((*CAUSAL, *rules)))
    heard: list[Summary] = []
    found = run("native", Columns(heard), q, k, v, call)
    wanted = run("reference", Columns(heard), q, k, v, call)
    assert close(found, wanted)
    for part in ("received", "seen", "entropy", "peak"):
        assert close(getattr(heard[0], part), getattr(heard[1], part)), part


def test_a_head_never_reads_what_is_not_its_own() -> None:
    """Whatever the places say of it: memory before the first head, or another head's entries, stay unread."""
    q, k, v, call = flat_step((1, 1300, 600, 7), (2, 2))
    wrong = replace(call, keys=Positions.row(0, 1300), queries=Positions.row(1300, 1))
    assert torch.equal(run("native", Same(), q, k, v, wrong), run("native", Same(), q, k, v, call))


class Louder(Method):
    """Doubles the keys, which makes a new tensor of them."""

    paper = PAPER

    @at(Site.KEY)
    def double(self, k: Tensor, call: Call) -> Tensor:
        return 2 * k


def test_keys_that_a_method_made_stand_beside_values_that_lie_flat() -> None:
    q, k, v, call = flat_step((900, 1300, 640, 7), (6, 2))
    assert close(run("native", Louder(), q, k, v, call), run("reference", Louder(), q, k, v, call))


@pytest.mark.parametrize("n", [3, 1])
def test_several_queries_or_blocks_find_flat_heads_padded(n: int) -> None:
    q, k, v, call = flat_step((30, 64, 40, 7), (6, 2))
    q = torch.cat([q, -q, 2 * q], 2)[:, :, :n]
    table = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    table[..., 0] = False
    for mask in (Mask(CAUSAL), Mask((*CAUSAL, Blocks(table, 32)))):
        there = replace(call, mask=mask, queries=Positions.row(64, n))
        assert close(run("native", Same(), q, k, v, there), run("reference", Same(), q, k, v, there))
