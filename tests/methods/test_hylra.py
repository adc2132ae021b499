"""HyLRA: layers that see all lend their key blocks to those behind them; a dynamic programme says which."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from heedful import attach, fit, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.mask import Causal, Window
from heedful.core.state import State
from heedful.methods.sparse.prefill.hylra import HyLRA, _Missed, best, block_map, cheapest
from tests.test_blocks import PADDED, call_of, grid_of, true_map


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_the_programme_finds_the_cheapest_layers(count: int) -> None:
    cost = torch.rand(7, 7, generator=torch.Generator().manual_seed(count))

    def total(full: tuple[int, ...]) -> float:
        return sum(float(cost[max(f for f in full if f <= i), i]) for i in range(7) if i not in full)

    wanted = min(((0, *rest) for rest in combinations(range(1, 7), count - 1)), key=total)
    assert cheapest(cost, count) == wanted


def test_the_map_is_that_of_some_true_rows() -> None:
    bare = Bare(text=PADDED)
    found = block_map(grid_of(bare, 8))
    for b, pad in enumerate((0, 5)):
        rows = true_map(bare, b).mean(0)[pad:, pad:]
        for i in range(-(-len(rows) // 8)):
            taken = rows[8 * i : 8 * i + 8][1::2].sum(0)
            wanted = torch.stack([x.sum() for x in taken.split(8)])
            assert close(found[b, 0, i, : len(wanted)], wanted)


def test_a_layer_sees_what_the_full_one_before_it_chose() -> None:
    bare = Bare()
    method = HyLRA(0.4, (1,), block=4, most=1.0)
    call = replace(call_of(bare), depth=4)
    assert method.skip(call.mask, call) is call.mask  # nobody has chosen yet
    full = replace(call, layer=1)
    assert method.skip(full.mask, full) is full.mask
    other = Bare(seed=1)
    (rule,) = method.skip(call.mask, replace(call_of(other), layer=2, state=call.state)).blocks
    grid = grid_of(bare, 4)
    weight = block_map(grid)
    for b in range(2):
        for i in range(5):
            room = -(-2 * (i + 1) // 5)
            best = {int(j) for j in weight[b, 0, i].topk(room).indices} | {i}
            assert {int(j) for j in rule.table[b, 0, i].nonzero()} == best, (b, i)


@pytest.mark.parametrize("kind", ["fit", "run"])
def test_nothing_is_lent_between_unlike_masks(kind: str) -> None:
    """A full layer behind one with a window, and a decoder behind an encoder: blocks of one shape, other ones open."""
    narrow, whole = Bare(rules=(Causal(), Window(5))), Bare()
    one, other = (replace(call_of(x), layer=i, depth=4) for i, x in enumerate((narrow, whole)))
    other = replace(other, state=one.state)
    if kind == "run":
        method = HyLRA(0.4, (0,), block=4, most=1.0)
        method.skip(one.mask, one)
        assert method.skip(other.mask, other) is other.mask
        alike = replace(one, layer=2)
        assert method.skip(alike.mask, alike) is not alike.mask
    else:
        reader = _Missed(0.4, 4)
        reader.look(one.mask, one)
        mean = reader.look(other.mask, other)
        assert mean is not None
        assert mean.value.tolist() == [0.0] * 4, "what sees all misses nothing"


def test_a_fit_finds_the_layers_that_lose_least() -> None:
    model = models.tiny("llama", num_hidden_layers=4)
    inputs = models.tiny_inputs(model, length=40)
    method = fit(HyLRA(0.3, whole=0.5, block=8, most=1.0), model, [inputs])
    assert method.full is not None
    assert len(method.full) == 2
    assert method.full[0] == 0
    with torch.no_grad(), attach(model, method) as run:
        run(**inputs)
        dense = {layer for layer, share in run.activity().density.items() if share > 0.5}
    assert dense == set(method.full)
    with pytest.raises(FieldError, match=r"HyLRA\.batches"):
        fit(HyLRA(), model, [])


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"whole": 0.0}, {"full": (-1,)}])
def test_wrong_fields_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(FieldError, match=f"HyLRA.{next(iter(settings))}"):
        HyLRA(**settings)  # type: ignore[arg-type]


def test_a_layer_misses_what_an_earlier_ones_blocks_leave_out() -> None:
    size, keep, n = 4, 0.5, 5  # blocks of 19 tokens
    state, tables = State(), []
    for layer in range(3):
        bare = Bare(seed=layer)
        call = replace(call_of(bare), layer=layer, depth=3, state=state)
        found = _Missed(keep, size).look(call.mask, call)
        assert found is not None
        missed, tables = [0.0] * 3, [*tables, []]
        for b in range(2):
            weights = true_map(bare, b).mean(0)  # over heads
            rows = [weights[i * size : (i + 1) * size] for i in range(n)]
            blocks = [[float(row[:, j * size : (j + 1) * size].sum()) for j in range(n)] for row in rows]
            ranked = [sorted(range(i + 1), key=lambda j, row=blocks[i]: -row[j]) for i in range(n)]
            tables[layer].append([set(ranked[i][: -int(-keep * (i + 1) // 1)]) for i in range(n)])
            for full in range(layer + 1):
                for own, other in zip(tables[layer][b], tables[full][b], strict=True):
                    missed[full] += (1 - len(own & other) / len(own)) / (2 * n)
        assert found.value.tolist() == pytest.approx(missed, abs=1e-6)
        assert layer == 0 or 0 < missed[0] < 1


def test_rows_of_padding_miss_nothing() -> None:
    state = State()
    for layer in range(2):
        call = replace(call_of(Bare(seed=layer, text=PADDED)), layer=layer, depth=2, state=state)
        found = _Missed(0.5, 4).look(call.mask, call)
        assert found is not None
        assert found.count.tolist() == [5 + 4] * 2, "blocks of 19 tokens, and of 14"
        assert float(found.value[layer]) == 0, "a layer shares all of its own"
        assert layer == 0 or 0 < float(found.value[0]) < 1


def test_of_many_equal_blocks_the_first_are_the_best() -> None:
    class Open:
        open = torch.ones(1, 1, 2, 40, dtype=torch.bool)

    assert best(torch.zeros(1, 1, 2, 40), Open(), 0.1)[0, 0].nonzero()[:, 1].tolist() == [0, 1, 2, 3] * 2  # type: ignore[arg-type]
