"""SeerAttention: what a gate sees and says of blocks, which it computes, and how it learns."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.methods.sparse.prefill.seer_attention import Pooled, SeerAttention, highest
from tests.by_hand import Steps, causal_map, llama_states
from tests.test_blocks import PADDED, bare_of, call_of, grid_of, true_map

SIZE, LONG = 4, 20
TEXTS = pytest.mark.parametrize("text", [None, PADDED], ids=["plain", "padded"])
ANGLES = torch.arange(19.0)[:, None] * torch.tensor([1.1, 0.4, 0.1, 0.02])  # [n pairs]


def turned(x: Tensor, row: int, back: bool = False) -> Tensor:
    """One head's vector `[d]` as a token in a row is turned: the halves are pairs."""
    a, b = x.chunk(2)
    cos, sin = ANGLES[row].cos(), ANGLES[row].sin() * (-1 if back else 1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin])


def rotate(x: Tensor) -> Tensor:
    out = x.clone()
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for n in range(x.shape[2]):
                out[b, h, n] = turned(x[b, h, n], n)
    return out


def gates(seed: int = 3) -> Tensor:
    return torch.randn(4, 24, 8, generator=torch.Generator().manual_seed(seed)) / 4


def by_loops(bare: Bare, text: int, pad: int, head: int, gate: Tensor, rotary: bool) -> Tensor:
    """A gate's scores of one head's pairs of blocks, token by token."""
    blocks = [range(i, min(i + SIZE, 19)) for i in range(pad, 19, SIZE)]

    def plain(x: Tensor, row: int) -> Tensor:
        return turned(x[row], row, back=True) if rotary else x[row]

    queries, keys = [], []
    for block in blocks:
        q = torch.stack([plain(bare.q[text, head], row) for row in block])
        k = torch.stack([plain(bare.k[text, head // 2], row) for row in block])
        pools = torch.cat([k.max(0).values, k.min(0).values, k.sum(0) / len(block)])
        both = q.sum(0) / len(block), pools @ gate[head]
        query, key = (turned(x, block[0]) if rotary else x for x in both)
        queries.append(query)
        keys.append(key)
    return torch.stack(queries) @ torch.stack(keys).T / math.sqrt(8)


@TEXTS
@pytest.mark.parametrize("rotary", [False, True])
def test_what_a_gate_says(text: Tensor | None, rotary: bool) -> None:
    bare = bare_of(text)
    bare.call = replace(bare.call, rotate=rotate if rotary else None)
    found = Pooled.of(grid_of(bare, SIZE)).scores(gates())
    assert bool(found.isfinite().all())
    for b, pad in enumerate((0, 0 if text is None else 5)):
        for head in range(4):
            wanted = by_loops(bare, b, pad, head, gates(), rotary)
            n = len(wanted)
            assert close(found[b, head, :n, :n], wanted), (b, head)


@pytest.mark.parametrize(("given", "wide"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_gates_compute_in_float32_or_above(given: str, wide: str) -> None:
    bare = Bare(dtype=getattr(torch, given))
    pooled = Pooled.of(grid_of(bare, SIZE))
    assert {x.dtype for x in (pooled.query, pooled.key)} == {getattr(torch, wide)}


def tables(method: SeerAttention, text: Tensor | None) -> tuple[Bare, Tensor]:
    bare = bare_of(text)
    (rule,) = method.skip(bare.call.mask, call_of(bare)).blocks
    return bare, rule.table


def fitted(gate: Tensor) -> Fitted:
    return Fitted({"gates.0": gate})


@TEXTS
@pytest.mark.parametrize("threshold", [0.1, 0.3])
@pytest.mark.parametrize("last", [0, 1])
def test_blocks_above_a_threshold(text: Tensor | None, threshold: float, last: int) -> None:
    bare, table = tables(SeerAttention(threshold, last=last, gates=fitted(gates()), block=SIZE, most=1.0), text)
    for b, pad in enumerate((0, 0 if text is None else 5)):
        for head in range(4):
            scores = by_loops(bare, b, pad, head, gates(), rotary=False)
            n = len(scores)
            for i in range(n):
                weight = scores[i, : i + 1].softmax(-1).tolist()
                wanted = [x > threshold or j == i or i >= n - last for j, x in enumerate(weight)]
                assert table[b, head, i, :n].tolist() == wanted + [False] * (n - i - 1)


@TEXTS
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_share_of_all_pairs(text: Tensor | None, share: float) -> None:
    """A share s of the triangle is the share 1 - sqrt(1 - s) of each row."""
    bare, table = tables(SeerAttention(share=share, last=0, gates=fitted(gates()), block=SIZE, most=1.0), text)
    for b, pad in enumerate((0, 0 if text is None else 5)):
        for head in range(4):
            scores = by_loops(bare, b, pad, head, gates(), rotary=False)
            n = len(scores)
            most = max(1, int((1 - math.sqrt(1 - share)) * n))
            for i in range(n):
                ranked = sorted(range(i + 1), key=lambda j: -float(scores[i, j]))
                wanted = {*ranked[:most], i}
                assert set(table[b, head, i].nonzero().flatten().tolist()) == wanted


def test_a_text_that_needs_most_blocks_stays_dense_and_short_ones_end_dense() -> None:
    bare = bare_of(None)
    for method in (SeerAttention(0.0, seed=0, block=SIZE), SeerAttention(1.0, last=5, seed=0, block=SIZE)):
        assert method.skip(bare.call.mask, call_of(bare)) is bare.call.mask
    assert not SeerAttention(0.0, seed=0).idle(bare.call)
    later = Bare(Shape(q=8, k=19)).call
    assert SeerAttention(0.0, seed=0).idle(later)


@TEXTS
def test_the_highest_weight_of_each_pair_of_blocks(text: Tensor | None) -> None:
    bare = bare_of(text)
    found = highest(grid_of(bare, SIZE))
    for b, pad in enumerate((0, 0 if text is None else 5)):
        for head, weights in enumerate(true_map(bare, b)):
            rows = [weights[i : i + SIZE] for i in range(pad, 19, SIZE)]
            wanted = torch.stack(
                [torch.stack([row[:, j : j + SIZE].max() for j in range(pad, 19, SIZE)]) for row in rows]
            )
            wanted = wanted / wanted.sum(-1, keepdim=True)
            n = len(wanted)
            assert close(found[b, head, :n, :n], wanted)
            assert not bool(found[b, head, n:].any())


def divergence(scores: Tensor, wanted: Tensor) -> Tensor:
    """Ten times the mean of p log(p / q) over all pairs of blocks, of which the rows of the first quarter are none."""
    n, total, count = scores.shape[-1], torch.zeros(()), 0
    for one, want in zip(scores.flatten(0, 1), wanted.flatten(0, 1), strict=True):
        for i in range(n // 4, n):
            found = one[i, : i + 1].log_softmax(-1)
            for j in range(n):
                if j <= i and float(want[i, j]) > 0:
                    total = total + want[i, j] * (want[i, j].log() - found[j])
                count += 1
    return 10 * total / count


def test_the_first_step_of_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient, by the formula: what a model's gates see, and the divergence from the highest weights."""
    model, seen = models.tiny("llama"), {}
    ids = torch.randint(3, 100, (2, LONG), generator=torch.Generator().manual_seed(0))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Any) -> Tensor:
        weights = causal_map(turn(q), turn(k))
        seen[layer] = q, k, turn, weights
        return weights @ v.repeat_interleave(2, 1)

    with torch.no_grad():
        llama_states(model, ids, attend)
    steps = Steps(monkeypatch)
    found = fit(SeerAttention(block=SIZE, steps=3, rate=0.1), model, [{"input_ids": ids}])
    assert steps.settings == [{"lr": 0.1, "weight_decay": 0.0}] * 2
    falls = [(1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]
    assert steps.rates == pytest.approx([0.1 * (step + 1) / 20 * fall for step, fall in enumerate(falls)] * 2)
    for layer in range(2):
        q, k, turn, weights = seen[layer]
        draw = torch.Generator().manual_seed(layer)
        gate = torch.nn.init.xavier_uniform_(torch.empty(4, 24, 8), generator=draw).requires_grad_()
        (before,) = steps.before[3 * layer]
        assert torch.equal(before, gate)
        blocks = [slice(i, i + SIZE) for i in range(0, LONG, SIZE)]
        pools = [torch.cat([k[:, :, b].amax(2), k[:, :, b].amin(2), k[:, :, b].mean(2)], -1) for b in blocks]
        key = torch.stack(pools, 2).repeat_interleave(2, 1) @ gate
        query = torch.stack([q[:, :, b].mean(2) for b in blocks], 2)
        query, key = (turn(x.repeat_interleave(SIZE, 2))[:, :, ::SIZE] for x in (query, key))
        wanted = torch.stack([torch.stack([weights[:, :, a, b].amax((2, 3)) for b in blocks], -1) for a in blocks], 2)
        loss = divergence(query @ key.mT / math.sqrt(8), wanted / wanted.sum(-1, keepdim=True))
        loss.backward()
        (grad,) = steps.grads[3 * layer]
        assert close(grad, gate.grad)
    assert set(found.gates) == {"gates.0", "gates.1"}
    assert not torch.equal(found.gates["gates.0"], steps.before[0][0])
    with torch.no_grad(), attach(model, replace(found, share=0.3, last=0, most=1.0)) as run:
        run(ids)


@pytest.mark.parametrize("blocks", [3, 6, 9])
def test_the_rows_that_a_fit_leaves_out(blocks: int) -> None:
    scores, wanted = torch.rand(2, 1, 2, blocks, blocks, generator=torch.Generator().manual_seed(0))
    wanted = wanted.tril() / wanted.tril().sum(-1, keepdim=True)
    found = SeerAttention().divergence(scores, wanted, torch.ones(blocks, blocks, dtype=torch.bool).tril())
    assert close(found, divergence(scores, wanted))


def test_the_rate_rises_to_its_height_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("llama", num_hidden_layers=1)
    steps = Steps(monkeypatch)
    ids = torch.randint(3, 100, (1, LONG), generator=torch.Generator().manual_seed(0))
    fit(SeerAttention(block=SIZE, steps=25), model, [{"input_ids": ids}])
    wanted = [1e-3 * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / 25)) / 2 for step in range(25)]
    assert steps.rates == pytest.approx(wanted)


def test_a_fit_keeps_the_pools_of_a_text_and_not_the_text() -> None:
    bare = bare_of(None)
    bare.call = replace(bare.call, rotate=lambda x: x)
    queries = weakref.ref(bare.call.hidden)
    pooled = Pooled.of(grid_of(bare, SIZE))
    del bare
    assert bool(pooled.scores(gates()).isfinite().all())
    assert queries() is None


def test_texts_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("llama", num_hidden_layers=1)
    texts = [torch.randint(3, 100, (1, LONG), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    steps = Steps(monkeypatch)
    fit(SeerAttention(block=SIZE, steps=4, rate=1e-12, seed=7), model, [{"input_ids": ids} for ids in texts])
    (a,), (b,), (c,), (d,) = steps.grads
    assert close(a, c)
    assert close(b, d)
    assert not close(a, b)
    draw = torch.Generator().manual_seed(7 * 4099)
    assert torch.equal(steps.before[0][0], torch.nn.init.xavier_uniform_(torch.empty(4, 24, 8), generator=draw))


def test_errors() -> None:
    for settings, what in (
        ({"threshold": 1.5}, "threshold = 1.5: must lie from 0 to 1"),
        ({"share": 0.0}, "share = 0.0: must be above 0"),
        ({"last": -1}, "last = -1: must be 0 or more"),
        ({"steps": 0}, "steps = 0: must be 1 or more"),
        ({"rate": 0.0}, "rate = 0.0: must be above 0"),
        ({"weight": 0.0}, "weight = 0.0: must be above 0"),
    ):
        with pytest.raises(FieldError, match=f"SeerAttention.{what}"):
            SeerAttention(**settings)  # type: ignore[arg-type]
    bare = bare_of(None)
    with pytest.raises(FieldError, match="gates = None: must be fitted"):
        SeerAttention().skip(bare.call.mask, call_of(bare))
    for gate in ({"gates.1": gates()}, {"gates.0": gates()[:3]}, {"gates.0": gates(), "gates.1": gates()}):
        with pytest.raises(FieldError, match="was fitted to another model"):
            SeerAttention(gates=Fitted(gate)).skip(bare.call.mask, call_of(bare))
    with pytest.raises(FieldError, match="batches = 0: must be 1 or more"):
        fit(SeerAttention(), models.tiny("llama"), [])
