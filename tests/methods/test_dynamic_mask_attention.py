"""Dynamic mask attention: what keys count by their values, which are seen, and what the first step learns; by loops."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare, Shape, parameters
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Blocks, Causal, Dense, Mask, Window
from heedful.core.positions import Positions
from heedful.core.rules import OnHeads
from heedful.kit.chosen import TOGETHER, Chosen, Reached
from heedful.methods import DynamicMaskAttention, SinkWindow

N = 11


def _bare(shape: Shape, **settings: object) -> Bare:
    return Bare(shape, dtype=torch.float64, **settings)  # type: ignore[arg-type]


def _counts(v: Tensor, weight: Tensor, rate: Tensor) -> list[list[Tensor]]:
    """exp(a softplus(W v)) of one text's keys, by head and key; v is all key heads' values of a token in a row."""
    g, n, d = v.shape
    found = []
    for head in range(g):
        row = []
        for j in range(n):
            x = sum(weight[head, other * d + i] * v[other, j, i] for other in range(g) for i in range(d))
            row.append(torch.exp(rate[head] * torch.log(1 + torch.exp(x))))
        found.append(row)
    return found


def _by_loops(bare: Bare, params: dict[str, Tensor], keep: int, sees: object = None) -> Tensor:
    """Heads `[b h q d]`, query by query; `sees(b, i, j)` for what is masked anyway."""
    s = bare.shape
    out = torch.zeros(s.b, s.h, s.q, s.dv, dtype=torch.float64)
    for b in range(s.b):
        counts = _counts(bare.v[b], params["weight"], params["rate"])
        for h, i in itertools.product(range(s.h), range(s.q)):
            head, at = h // (s.h // s.g), s.k - s.q + i
            free = [j for j in range(at + 1) if sees is None or sees(b, at, j)]  # type: ignore[operator]
            best = sorted(free, key=lambda j, head=head: (-counts[head][j].item(), -j))[:keep]
            if not best:
                continue
            score = [bare.q[b, h, i] @ bare.k[b, head, j] / math.sqrt(s.d) + counts[head][j] for j in best]
            weights = torch.stack(score).softmax(-1)
            out[b, h, i] = sum(w * bare.v[b, head, j] for w, j in zip(weights, best, strict=True))
    return out


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("shape", [Shape(q=N, k=N), Shape(q=3, k=N), Shape(q=1, k=N), Shape(g=4, q=N, k=N, dv=5)])
@pytest.mark.parametrize("keep", [1, 4, 10, N, 40])
def test_the_formula(keep: int, shape: Shape, backend: str) -> None:
    method, bare = DynamicMaskAttention(keep, start=0.7, spread=0.3), _bare(shape)
    params = parameters(method, shape.layer, bare.dtype)
    found, _ = bare.run(method, backend, 2 if backend == "tiled" else None, params)
    assert close(found, _by_loops(bare, params, keep))


def test_keys_that_a_mask_hides_take_nobodys_room() -> None:
    method, shape = DynamicMaskAttention(3, start=-0.7, spread=0.3), Shape(q=N, k=N)
    text = torch.arange(N) >= torch.tensor([0, 4])[:, None]
    bare = _bare(shape, text=text)
    params = parameters(method, shape.layer, bare.dtype)
    want = _by_loops(bare, params, 3, lambda b, i, j: bool(text[b, j]))
    is_text = text[:, None, :, None]
    assert close(bare.run(method, "tiled", 3, params)[0] * is_text, want * is_text)
    narrow = _bare(shape, rules=(Causal(), Window(6)))
    want = _by_loops(narrow, params, 3, lambda b, i, j: i - j < 6)
    assert close(narrow.run(method, "reference", None, params)[0], want)


def _best(call: Call, keep: int, table: Tensor | None = None) -> Tensor:
    """The keys of highest counts among those that each row may see, all so far where no table says otherwise."""
    assert call.value is not None
    told = call.value.transpose(1, 2).flatten(2) @ call.params["weight"].mT
    counts = torch.exp(call.params["rate"] * torch.log(1 + torch.exp(told))).mT.repeat_interleave(
        call.heads // call.kv_heads, 1
    )
    n = counts.shape[-1]
    table = torch.ones(*counts.shape[:2], n, n, dtype=torch.bool).tril() if table is None else table
    best = counts[:, :, None].expand(table.shape).masked_fill(~table, -1).topk(keep).indices
    return torch.zeros_like(table).scatter(-1, best, True) & table


@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize("keep", [3, 150])
def test_of_a_long_text_each_row_sees_the_best_it_may_and_no_more(keep: int, g: int) -> None:
    """Longer than what is picked at once, by a mask for each head that some rows see nothing of."""
    n, draw = TOGETHER + 44, torch.Generator().manual_seed(2)
    method, bare = DynamicMaskAttention(keep, start=0.7, spread=0.3), _bare(Shape(g=g, q=n, k=n))
    bare.call = replace(bare.call, value=bare.v, params=parameters(method, bare.shape.layer, bare.dtype))
    table = (torch.rand(2, 4, n, n, generator=draw) < 0.7).tril()
    table[0, 1, -40:-20] = False
    picked = method.choose(Mask((Dense(table),)), bare.call).rules[-1]
    want = _best(bare.call, keep, table)
    for rows in (slice(n - 60, n), slice(10, 20), slice(None)):
        assert torch.equal(picked.keeps(bare.call.tile(rows, slice(0, n)).pairs), want[:, :, rows])


def test_where_a_querys_keys_are_one_range_no_pair_is_picked() -> None:
    method, bare = DynamicMaskAttention(3, start=0.7, spread=0.3), _bare(Shape(q=N, k=N))
    call = replace(bare.call, value=bare.v, params=parameters(method, bare.shape.layer, bare.dtype))
    table = torch.ones(1, 1, -(-N // 4), -(-N // 4), dtype=torch.bool)
    for rules, kind in (((Causal(),), Reached), ((Causal(), Blocks(table, 4)), Chosen)):
        mask = Mask(rules)
        picked = method.choose(mask, call).rules[-1]
        assert type(picked) is kind
        pairs = call.tile(slice(0, N), slice(0, N)).pairs
        assert torch.equal(picked.keeps(pairs) & Causal().keeps(pairs), _best(call, 3))


def test_heads_that_share_one_key_head_may_have_ranges_of_their_own() -> None:
    method, bare = DynamicMaskAttention(3, start=0.7, spread=0.3), _bare(Shape(g=1, q=N, k=N))
    call = replace(bare.call, value=bare.v, params=parameters(method, bare.shape.layer, bare.dtype))
    pairs = call.tile(slice(0, N), slice(0, N)).pairs
    before = Mask((Causal(), OnHeads(Window(5), (0, 2), 4)))
    after = method.choose(before, call)
    assert isinstance(after.rules[-1], Reached)
    assert torch.equal(after.keeps(pairs), _best(call, 3, before.keeps(pairs).expand(2, -1, -1, -1)))


def test_of_equals_the_newest_are_seen_so_that_it_begins_as_a_window() -> None:
    shape = Shape(q=N, k=N)
    bare = _bare(shape)
    found, _ = bare.run(DynamicMaskAttention(4), "tiled", 3)
    weights = bare.q @ bare.k.repeat_interleave(2, 1).mT / math.sqrt(shape.d)
    i, j = torch.arange(N)[:, None], torch.arange(N)
    weights = weights.masked_fill((j > i) | (i - j >= 4), -torch.inf).softmax(-1)
    assert close(found, weights @ bare.v.repeat_interleave(2, 1))


def test_the_first_steps_loss_and_gradient_are_those_of_the_loops() -> None:
    method, shape = DynamicMaskAttention(3, start=0.4, spread=0.3), Shape(q=6, k=6)
    bare = _bare(shape)
    params = {name: x.requires_grad_(True) for name, x in parameters(method, shape.layer, bare.dtype).items()}
    bare.v.requires_grad_(True)
    losses = [
        (heads - 1).square().mean() for heads in (bare.run(method, "tiled", 2, params)[0], _by_loops(bare, params, 3))
    ]
    assert close(losses[0], losses[1])
    grads = [torch.autograd.grad(loss, [*params.values(), bare.v]) for loss in losses]
    for one, other in zip(*grads, strict=True):
        assert bool(other.any())
        assert close(one, other)


@pytest.mark.parametrize("narrow", [None, SinkWindow(1, 5)])
def test_token_by_token_is_the_whole(narrow: SinkWindow | None) -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=16)["input_ids"]
    method = DynamicMaskAttention(3, start=0.8, spread=0.5)
    with attach(model, method if narrow is None else narrow | method) as run, torch.no_grad():
        whole, cache, parts = run(input_ids=ids).logits, None, []
        for start, stop in itertools.pairwise((0, 9, 10, 11, 16) if narrow is None else (0, 9, 10, 11, 12)):
            out = run(input_ids=ids[:, start:stop], use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            parts.append(out.logits)
    found = torch.cat(parts, 1)
    assert close_model(found, whole[:, : found.shape[1]])


def test_how_many_pairs_are_left() -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=16)["input_ids"]
    with attach(model, DynamicMaskAttention(3, start=0.8, spread=0.5)) as run, torch.no_grad():
        run(input_ids=ids)
    assert run.activity().density == pytest.approx(dict.fromkeys(range(2), sum(min(i, 3) for i in range(1, 17)) / 256))


def test_heads_that_hold_unlike_tokens_are_refused() -> None:
    bare, method = _bare(Shape(b=1, q=1, k=6)), DynamicMaskAttention(3)
    call = replace(bare.call, value=bare.v, params=parameters(method, bare.shape.layer, bare.dtype))
    index = torch.tensor([[0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 5, 6]])[None]
    filled = torch.ones(1, 2, 6, dtype=torch.bool)
    one = filled.clone()
    one[0, 1, 0] = False
    same = index[:, :1].expand(-1, 2, -1)
    for keys in (Positions(index, index), Positions(same, same, is_filled=one)):
        for act in (lambda c: method.choose(c.mask, c), method.favour):
            with pytest.raises(SiteError, match="layer 0: heads hold unlike tokens"):
                act(replace(call, keys=keys))
    method.choose(call.mask, replace(call, keys=Positions(same, same, is_filled=filled)))
    with pytest.raises(SiteError, match="told by their values, and none are handed"):
        method.choose(call.mask, replace(call, value=None))


def test_what_it_is_asked_for_it_leaves_alone() -> None:
    bare = _bare(Shape(q=4, k=4))
    mask = Mask((Causal(),))
    assert DynamicMaskAttention(4).choose(mask, bare.call) is mask
    assert DynamicMaskAttention().idle(replace(bare.call, cross=True))
    assert not DynamicMaskAttention().idle(bare.call)


def test_the_start() -> None:
    layer = Layer(number=0, heads=4, kv_heads=2, head_dim=8, value_dim=6, width=32)
    first = DynamicMaskAttention(spread=0.5, start=0.25).parameters(layer)
    again = DynamicMaskAttention(spread=0.5, start=0.25).parameters(layer)
    other = DynamicMaskAttention(spread=0.5, start=0.25).parameters(replace(layer, number=1))
    assert {name: tuple(x.shape) for name, x in first.items()} == {"weight": (2, 12), "rate": (2,)}
    assert torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["weight"], other["weight"])
    assert torch.equal(first["rate"], torch.tensor([0.25, 0.25]))
    assert 0.3 < float(first["weight"].std()) < 0.7


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"keep": 0}, r"DynamicMaskAttention\.keep = 0: must be 1 or more"),
        ({"start": math.nan}, r"DynamicMaskAttention\.start"),
        ({"spread": -0.1}, r"DynamicMaskAttention\.spread"),
        ({"spread": math.inf}, r"DynamicMaskAttention\.spread"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        DynamicMaskAttention(**settings)  # type: ignore[arg-type]
