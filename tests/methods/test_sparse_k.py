"""SparseK: thresholds by halving, gates and what they leave by loops, gradients by the paper's Jacobian."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import CachedKV, Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Blocks, Causal, Mask, Where, Window
from heedful.core.rules import OnHeads
from heedful.core.state import State
from heedful.kit.chosen import Chosen
from heedful.methods import SparseK
from heedful.methods.mechanisms.routed import sparse_k
from heedful.methods.mechanisms.routed.sparse_k import threshold, threshold_of_ranges

N = 11
TEXT = torch.arange(N) >= torch.tensor([0, 4])[:, None]


def _bare(shape: Shape | None = None, **settings: object) -> tuple[Bare, dict[str, Tensor]]:
    bare = Bare(shape or Shape(q=N, k=N), dtype=torch.float64, **settings)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(1)
    return bare, {"score": 0.2 * torch.randn(bare.shape.g, 24, generator=draw, dtype=torch.float64)}


def _gates(u: list[Tensor], k: int) -> list[Tensor]:
    """clip(u - tau, 0, 1) with a sum of k, tau by halving; slopes are the paper's, diag(s) - s s' / |s|."""
    if len(u) <= k:
        return [torch.ones_like(x) for x in u]
    told = [float(x.detach()) for x in u]
    low, high = min(told) - 1, max(told)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(min(max(x - middle, 0.0), 1.0) for x in told) > k:
            low = middle
        else:
            high = middle
    out = [min(max(x - low, 0.0), 1.0) for x in told]
    partly = [j for j, p in enumerate(out) if 0 < p < 1]
    mean = sum(u[j] for j in partly) / len(partly) if partly else torch.zeros(())
    slopes = [u[j] - mean if j in partly else torch.zeros_like(u[j]) for j in range(len(u))]
    return [p + slope - slope.detach() for p, slope in zip(out, slopes, strict=True)]


def _by_loops(bare: Bare, weight: Tensor, k: int, sees: object = None) -> Tensor:
    s = bare.shape
    out = torch.zeros(s.b, s.h, s.q, s.dv, dtype=torch.float64)
    for b, h, i in itertools.product(range(s.b), range(s.h), range(s.q)):
        g = h // (s.h // s.g)
        seen = [j for j in range(s.k) if (sees(b, i, j) if sees else j <= i)]  # type: ignore[operator]
        if not seen:
            continue
        u = [sum(weight[g, e] * bare.hidden[b, j, e] for e in range(s.e)) for j in seen]
        best = sorted(range(len(seen)), key=lambda x, u=u: -float(u[x].detach()))[:k]
        m = _gates(u, k)
        scores = torch.stack([m[x] * (bare.q[b, h, i] @ bare.k[b, g, seen[x]]) / math.sqrt(s.d) for x in best])
        out[b, h, i] = sum(
            p * m[x] * bare.v[b, g, seen[x]] for p, x in zip(scores.softmax(0), best, strict=True)
        )  # fmt: skip
    return out


@pytest.fixture(params=[2, sparse_k.ROWS], ids=["by ranges", "by pairs"])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds of more rows than these are told of ranges of tokens."""
    monkeypatch.setattr(sparse_k, "ROWS", request.param)


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("shape", [Shape(q=N, k=N), Shape(g=4, q=N, k=N, dv=5)])
@pytest.mark.parametrize("keep", [1, 3, 10, N, 40])
def test_the_formula(keep: int, shape: Shape, backend: str) -> None:
    bare, params = _bare(shape)
    found, _ = bare.run(SparseK(keep), backend, 2 if backend == "tiled" else None, params)
    assert close(found, _by_loops(bare, params["score"], keep))


def test_thresholds_are_sought_for_a_block_of_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, params = _bare(rules=(Causal(), Where(lambda q, k: k % 3 != 1)))  # which leaves no query a single range
    want = _by_loops(bare, params["score"], 3, lambda b, i, j: j <= i and j % 3 != 1)
    for rows in (1, 4, N):
        monkeypatch.setattr(sparse_k, "ROWS", rows)
        assert close(bare.run(SparseK(3), "reference", params=params)[0], want)


@pytest.mark.parametrize("rows", [1, N])  # by ranges, and pair by pair
@pytest.mark.parametrize("g", [1, 2])
def test_each_head_may_be_behind_a_mask_of_its_own(g: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_k, "ROWS", rows)
    bare, params = _bare(Shape(g=g, q=N, k=N), rules=(Causal(), OnHeads(Window(6), (0, 2), 4)))
    narrow, wide = (_by_loops(bare, params["score"], 3, lambda b, i, j, n=n: 0 <= i - j < n) for n in (6, N))
    want = torch.stack([narrow[:, 0], wide[:, 1], narrow[:, 2], wide[:, 3]], 1)
    assert close(bare.run(SparseK(3), "reference", params=params)[0], want)


def test_ranges_are_asked_for_more_rows_than_are_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, params = _bare()
    asked = []
    monkeypatch.setattr(sparse_k, "threshold_of_ranges", lambda *given: asked.append(1) or threshold_of_ranges(*given))
    for rows, times in ((N, 0), (N - 1, 1)):
        monkeypatch.setattr(sparse_k, "ROWS", rows)
        bare.run(SparseK(3), "reference", params=params)
        assert len(asked) == times


@pytest.mark.usefixtures("told")
def test_keys_that_a_mask_hides_take_nobodys_room() -> None:
    bare, params = _bare(text=TEXT)
    want = _by_loops(bare, params["score"], 3, lambda b, i, j: j <= i and bool(TEXT[b, j]))
    assert close(bare.run(SparseK(3), "tiled", 3, params)[0] * TEXT[:, None, :, None], want)
    narrow, params = _bare(rules=(Causal(), Window(6)))
    want = _by_loops(narrow, params["score"], 3, lambda b, i, j: 0 <= i - j < 6)
    assert close(narrow.run(SparseK(3), "reference", None, params)[0], want)
    table = torch.ones(4, 4).tril().bool()
    table[2, 0] = table[3, 1:3] = False
    cut, params = _bare(rules=(Causal(), Blocks(table[None, None], 3)))
    want = _by_loops(cut, params["score"], 3, lambda b, i, j: j <= i and bool(table[i // 3, j // 3]))
    assert close(cut.run(SparseK(3), "reference", None, params)[0], want)
    image, params = _bare(rules=())
    want = _by_loops(image, params["score"], 3, lambda b, i, j: True)
    assert close(image.run(SparseK(3), "reference", None, params)[0], want)


@pytest.mark.usefixtures("told")
def test_the_first_steps_loss_and_gradient_are_those_of_the_loops() -> None:
    bare, params = _bare(Shape(q=7, k=7))
    leaves = [params["score"], bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    heads = (bare.run(SparseK(3), "tiled", 2, params)[0], _by_loops(bare, params["score"], 3))
    losses = [(x - 1).square().mean() for x in heads]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_gates_sum_to_k(k: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(2)
    u = scale * torch.randn(40, 1, 9, generator=draw, dtype=torch.float64)
    there = torch.rand(40, 3, 9, generator=draw) < 0.6
    there[0, 0] = False
    level, _ = threshold(u, there, k)
    found = (u - level).clamp(0, 1) * there
    assert level.shape == (40, 3, 1)
    assert close(found.sum(-1), there.sum(-1).clamp(max=k).double())
    for i, r in itertools.product(range(40), range(3)):
        mine = there[i, r].nonzero().flatten().tolist()
        want = _gates([u[i, 0, j] for j in mine], k)
        assert close(found[i, r, mine], torch.tensor([float(x) for x in want], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_sum_to_k_in_models_of_half_precision(dtype: torch.dtype) -> None:
    bare, method = Bare(Shape(q=200, k=200), dtype=dtype), SparseK(20)
    call = replace(bare.call, params={"score": torch.ones(2, 24, dtype=dtype)}, state=State())
    method.choose(call.mask, call)
    sums = method._gates(call).tril().sum(-1).float()
    assert close(sums, torch.arange(1.0, 201).clamp(max=20).expand_as(sums))


def test_equals_share_the_gates_and_wide_gaps_make_them_hard() -> None:
    every = torch.ones(1, 4, dtype=torch.bool)
    even = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    assert close((even - threshold(even, every, 2)[0]).clamp(0, 1), torch.full((1, 4), 0.5, dtype=torch.float64))
    apart = torch.tensor([[8.0, -3.0, 4.0, 0.0]], dtype=torch.float64, requires_grad=True)
    gates = (apart - threshold(apart, every, 2)[0]).clamp(0, 1)
    assert gates.tolist() == [[1.0, 0.0, 1.0, 0.0]]
    assert not bool(torch.autograd.grad(gates.square().sum(), apart)[0].any())
    whole = (apart - threshold(apart, every, 4)[0]).clamp(0, 1)
    assert whole.tolist() == [[1.0] * 4]
    assert not bool(torch.autograd.grad(whole.square().sum(), apart)[0].any())


@pytest.mark.usefixtures("told")
def test_of_equals_the_earlier_are_seen() -> None:
    bare, _ = _bare()
    params = {"score": torch.zeros(2, 24, dtype=torch.float64)}
    mask = SparseK(3).choose(Mask((Causal(),)), replace(bare.call, params=params, state=State()))
    keep = mask.keeps(bare.call.pairs)
    assert keep is not None
    want = torch.ones(N, N).tril() * (torch.arange(N) < 3)
    assert torch.equal(keep.expand(2, 4, -1, -1), want.bool().expand(2, 4, -1, -1))


@pytest.mark.usefixtures("told")
def test_token_by_token_is_the_whole_and_so_many_pairs_are_left() -> None:
    model = models.tiny("llama").eval()
    ids = torch.arange(5, 37).view(2, 16)  # no token twice: two would tie but for how products are rounded
    with attach(model, SparseK(3)) as run, torch.no_grad():
        whole, cache, parts = run(input_ids=ids).logits, None, []
        density = run.activity().density
        for start, stop in itertools.pairwise((0, 9, 10, 11, 16)):
            out = run(input_ids=ids[:, start:stop], use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            parts.append(out.logits)
    assert close_model(torch.cat(parts, 1), whole)
    assert density == pytest.approx(dict.fromkeys(range(2), sum(min(i, 3) for i in range(1, 17)) / 256))


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_cache_holds_what_later_tokens_may_see(groups: int) -> None:
    bare, params = _bare(Shape(g=groups, q=N, k=N), text=TEXT)
    call = replace(bare.call, params=params, state=State())
    mask = SparseK(3).choose(call.mask, call)
    entries = CachedKV(bare.k, bare.v, bare.call.keys, N, TEXT[:, None])
    found = SparseK(3).drop(entries, replace(call, mask=mask))
    for b, g in itertools.product(range(2), range(groups)):
        mine = TEXT[b].nonzero().flatten().tolist()
        gates = _gates([params["score"][g] @ bare.hidden[b, j] for j in mine], 3)
        assert found[b, g].nonzero().flatten().tolist() == [j for j, m in zip(mine, gates, strict=True) if m > 0]
    hidden_today = Chosen(lambda rows: torch.arange(N) < 6)  # what the next token sees, only that rule knows
    for narrow in (mask & Window(6), Mask((Causal(), hidden_today)) & mask.rules[-1]):
        assert torch.equal(SparseK(3).drop(entries, replace(call, mask=narrow)), entries.is_filled)
    state = State()
    few = replace(bare.call, params=params, state=state)
    mask = SparseK(N).choose(few.mask, few)
    assert torch.equal(SparseK(N).drop(entries, replace(few, mask=mask)), TEXT[:, None].expand(2, groups, N))


def test_a_cache_drops_a_key_whose_gate_is_just_shut() -> None:
    bare, _ = _bare(Shape(b=1, h=1, g=1, q=3, k=3))
    weight = bare.hidden[0].pinverse() @ torch.tensor([[1.0], [1.0], [0.0]], dtype=torch.float64)
    state = State()
    call = replace(bare.call, params={"score": weight.mT}, state=state)
    mask = SparseK(2).choose(call.mask, call)
    scores, levels = state.forward["0"]
    state.forward["0"] = scores.round(), levels.round()  # 1, 1 and 0 above a level of 0
    entries = CachedKV(bare.k, bare.v, bare.call.keys, 3)
    assert SparseK(2).drop(entries, replace(call, mask=mask)).tolist() == [[[True, True, False]]]


def test_what_a_cache_holds_does_not_grow_with_the_text() -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=40)["input_ids"]
    with attach(model, SparseK(3)) as run, torch.no_grad():
        run.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        assert all(0.05 < held / seen < 0.5 for held, seen in run.activity().kept.values())


@pytest.mark.usefixtures("told")
def test_tokens_that_were_read_without_it_are_never_chosen() -> None:
    bare, params = _bare(Shape(q=4, k=N))
    mask = SparseK(9).choose(Mask((Causal(),)), replace(bare.call, params=params, state=State()))
    keep = mask.keeps(bare.call.tile(slice(0, 4), slice(0, N)).pairs)
    assert keep is not None
    assert not bool(keep[..., : N - 4].any())
    assert torch.equal(keep[..., N - 4 :].expand(2, 4, 4, 4), torch.ones(4, 4).tril().bool().expand(2, 4, 4, 4))


def test_what_it_cannot_serve() -> None:
    bare, params = _bare()
    assert SparseK().idle(replace(bare.call, cross=True))
    assert not SparseK().idle(bare.call)
    with pytest.raises(SiteError, match="SparseK, layer 0: the block is not handed hidden states to score by"):
        SparseK().choose(Mask(), replace(bare.call, params=params, hidden=None))
    with pytest.raises(FieldError, match=r"SparseK\.keep = 0: must be 1 or more"):
        SparseK(0)
    assert SparseK().keep == 512


def test_the_start() -> None:
    layer = Layer(0, 4, 2, 8, 8, 400)
    score = SparseK().parameters(layer)["score"]
    assert score.shape == (2, 400)
    assert torch.equal(score, SparseK().parameters(layer)["score"])
    assert not torch.equal(score, SparseK().parameters(replace(layer, number=1))["score"])
    assert 0.049 < float(score.max()) <= 0.05
    assert -0.05 <= float(score.min()) < -0.049
