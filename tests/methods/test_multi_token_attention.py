"""Multi-token attention: kernels and mixtures of heads, by loops."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.functional import conv2d

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare, Shape, parameters
from heedful.conformance.tolerances import close, close_model
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Causal, First, Window
from heedful.core.positions import Positions
from heedful.methods import MultiTokenAttention, SinkWindow
from heedful.methods.mechanisms.score.multi_token_attention import correlated

FULL = MultiTokenAttention((3, 5), 1, (2, 3), 2, spread=0.4)
PARTS = [
    FULL,
    MultiTokenAttention((1, 5), None, None, None, spread=0.4),
    MultiTokenAttention((4, 1), 2, None, None, spread=0.4),
    MultiTokenAttention(None, None, (3, 3), None, spread=0.4),
    MultiTokenAttention(None, None, None, 2, spread=0.4),
    MultiTokenAttention(None, 4, None, 1, spread=0.4),
]


def _convolved(x: Tensor, kernel: Tensor, keep: Tensor) -> Tensor:
    """Pair by pair: the last row of a kernel is the query's own, its middle column the key's own."""
    out = torch.zeros_like(x)
    _, heads, n, m = x.shape
    rows, columns = kernel.shape[1:]
    for h, i, j in itertools.product(range(heads), range(n), range(m)):
        for up, side in itertools.product(range(rows), range(-(columns // 2), columns // 2 + 1)):
            if i - up >= 0 and 0 <= j + side < m and keep[i - up, j + side]:
                out[:, h, i, j] += kernel[h, rows - 1 - up, columns // 2 + side] * x[:, h, i - up, j + side]
    return out


def _mixed(x: Tensor, mix: Tensor) -> Tensor:
    size, out = mix.shape[1], torch.zeros_like(x)
    for h in range(x.shape[1]):
        for other in range(size):
            out[:, h] += mix[h // size, other, h % size] * x[:, h // size * size + other]
    return out


def _by_loops(bare: Bare, p: dict[str, Tensor], keep: Tensor) -> Tensor:
    """Heads, from the paper: scores under a kernel, mixed, masked, softmax, the weights under a kernel, mixed."""
    k, v = (x.repeat_interleave(bare.shape.h // bare.shape.g, 1) for x in (bare.k, bare.v))
    x = bare.q @ k.mT * bare.call.scale
    if "before" in p:
        x = _convolved(x, p["before"], keep)
    if "groups_before" in p:
        x = _mixed(x, p["groups_before"])
    x = x.masked_fill(~keep, -torch.inf).softmax(-1)
    if "after" in p:
        x = _convolved(x, p["after"], keep).masked_fill(~keep, 0.0)
    if "groups_after" in p:
        x = _mixed(x, p["groups_after"])
    return x @ v


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("method", PARTS, ids=repr)
def test_the_formula(method: MultiTokenAttention, backend: str) -> None:
    bare = Bare(Shape(q=9, k=9), dtype=torch.float64)
    params = parameters(method, bare.shape.layer, bare.dtype)
    keep = torch.ones(9, 9, dtype=torch.bool).tril()
    found, _ = bare.run(method, backend, 2 if backend == "tiled" else None, params)
    assert close(found, _by_loops(bare, params, keep))


def test_neighbours_are_tokens_and_not_columns() -> None:
    """Sinks and a window leave a gap between columns that tiles put beside one another."""
    rules = (Causal(), Window(3) | First(2))
    bare = Bare(Shape(q=12, k=12), dtype=torch.float64, rules=rules)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    keep = (j <= i) & ((i - j < 3) | (j < 2))
    for method in PARTS[:2]:
        params = parameters(method, bare.shape.layer, bare.dtype)
        for rows in (1, 5):
            assert close(bare.run(method, "tiled", rows, params)[0], _by_loops(bare, params, keep))


def test_dropped_and_empty_entries_count_as_masked_ones() -> None:
    """A cache that kept other tokens for each head, against one that kept all with the dropped ones masked."""
    method = MultiTokenAttention((1, 3), None, None, None, spread=0.4)
    bare = Bare(Shape(b=1, q=1, k=8), dtype=torch.float64)
    params = parameters(method, bare.shape.layer, bare.dtype)
    index = torch.tensor([[0, 1, 4, 5, 6, 7, 0, 0], [0, 2, 3, 4, 5, 6, 7, 2]])[None]
    valid = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)[None]
    scores = bare.q @ bare.k.repeat_interleave(2, 1).mT
    call = replace(bare.call, keys=Positions(index, index, is_filled=valid), params=params)
    part = call.tile(slice(0, 1), slice(0, 8))
    found = method.convolve_scores(scores, replace(part, keep=call.mask.keeps(part.pairs)))
    for h in range(4):
        own, ok = index[0, h // 2], valid[0, h // 2]
        whole = {int(i): scores[0, h, 0, c] for c, i in enumerate(own) if ok[c]}
        for c in ok.nonzero().flatten().tolist():
            want = sum(params["before"][h, 0, 1 + s] * whole.get(int(own[c]) + s, 0.0) for s in (-1, 0, 1))
            assert close(found[0, h, 0, c], torch.as_tensor(want))


@pytest.mark.parametrize("stack", [FULL, MultiTokenAttention(spread=0.3), FULL | FULL.on(layers=1)], ids=repr)
@pytest.mark.parametrize("cuts", [(0, 9, 10, 11, 16), (0, 1, 2, 14, 15, 16)])
def test_token_by_token_is_the_whole(stack: MultiTokenAttention, cuts: tuple[int, ...]) -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=16)["input_ids"]
    with attach(model, stack) as run, torch.no_grad():
        whole, cache, parts = run(input_ids=ids).logits, None, []
        for start, stop in itertools.pairwise(cuts):
            out = run(input_ids=ids[:, start:stop], use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            parts.append(out.logits)
    assert close_model(torch.cat(parts, 1), whole)


def test_a_cache_that_dropped_what_the_rows_above_saw_is_refused() -> None:
    """A neighbouring key of a neighbouring query may be one that the cache no longer holds."""
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=12)["input_ids"]
    with attach(model, SinkWindow(1, 4) | FULL) as run, torch.no_grad():
        out = run(input_ids=ids[:, :8], use_cache=True)
        assert close_model(out.logits, run(input_ids=ids).logits[:, :8])
        with pytest.raises(SiteError, match="no longer holds what these saw"):
            run(input_ids=ids[:, 8:9], use_cache=True, **{CACHE: out[CACHE]})


def test_how_many_rows_it_looks_at() -> None:
    kinds = ((3, 5), None), ((1, 5), (4, 1)), (None, (2, 3)), ((6, 11), (6, 11)), (None, None)
    assert [MultiTokenAttention(before, after=after).above() for before, after in kinds] == [2, 3, 1, 10, 0]


def test_it_starts_as_the_identity_and_the_first_step_is_that_of_the_loops() -> None:
    bare = Bare(Shape(q=6, k=6), dtype=torch.float64)
    method = MultiTokenAttention((2, 3), 2, (2, 3), 2)
    keep = torch.ones(6, 6, dtype=torch.bool).tril()
    plain = _by_loops(bare, {}, keep)
    params = {name: x.requires_grad_(True) for name, x in parameters(method, bare.shape.layer, bare.dtype).items()}
    assert {name: tuple(x.shape) for name, x in params.items()} == {
        "before": (4, 2, 3), "groups_before": (2, 2, 2), "after": (4, 2, 3), "groups_after": (2, 2, 2)
    }  # fmt: skip
    target = torch.randn(plain.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = []
    for heads in (bare.run(method, "tiled", 2, params)[0], _by_loops(bare, params, keep)):
        assert close(heads, plain)
        losses.append((heads - target).square().mean())
    assert close(losses[0], losses[1])
    grads = [torch.autograd.grad(loss, list(params.values())) for loss in losses]
    for one, other in zip(*grads, strict=True):
        assert bool(other.any())
        assert close(one, other)


def _by_torch(x: Tensor, kernel: Tensor) -> Tensor:
    return conv2d(x, kernel[:, None], groups=len(kernel))


@pytest.mark.parametrize(("rows", "columns", "total"), [(1, 1, 16), (3, 5, 17), (2, 1, 40), (1, 7, 9), (4, 3, 33)])
def test_maps_under_kernels_and_their_ways_back(rows: int, columns: int, total: int) -> None:
    draw = torch.Generator().manual_seed(4)
    shapes = ((2, 3, rows + 4, total + columns - 1), (3, rows, columns), (2, 3, 5, total))
    x, kernel, weight = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    given = x.requires_grad_(), kernel.requires_grad_()
    found, wanted = correlated(*given), _by_torch(*given)
    assert close(found, wanted)
    slopes = [torch.autograd.grad((y * weight).sum(), given, create_graph=True) for y in (found, wanted)]
    for one, other in zip(*slopes, strict=True):
        assert close(one, other, 512)
    again = [torch.autograd.grad((a.square().sum() + b.square().sum()), given) for a, b in slopes]
    for one, other in zip(*again, strict=True):
        assert close(one, other, 512)
    for i in range(2):  # one of them alone
        alone = correlated(*(y if i == j else y.detach() for j, y in enumerate(given)))
        assert close(torch.autograd.grad((alone * weight).sum(), given[i])[0], slopes[1][i], 512)


# torch scripts its own rules when a derivative is first carried forward
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_maps_under_kernels_carry_derivatives_forward_and_serve_many_inputs() -> None:
    draw = torch.Generator().manual_seed(4)
    x, way, kernel = (torch.randn(shape, generator=draw) for shape in ((1, 2, 5, 20), (1, 2, 5, 20), (2, 2, 3)))
    assert close(jvp(lambda y: correlated(y, kernel), (x,), (way,))[1], _by_torch(way, kernel))
    many = vmap(lambda y: correlated(y, kernel))(torch.stack([x, way]))
    assert close(many[1], _by_torch(way, kernel))


def test_the_start_is_drawn_by_layer() -> None:
    layer = Layer(number=0, heads=4, kv_heads=2, head_dim=8, value_dim=8, width=32)
    before = MultiTokenAttention((6, 11), spread=0.5).parameters(layer)["before"]
    again = MultiTokenAttention((6, 11), spread=0.5).parameters(layer)["before"]
    other = MultiTokenAttention((6, 11), spread=0.5).parameters(replace(layer, number=1))["before"]
    assert torch.equal(before, again)
    assert not torch.equal(before, other)
    noise = before.clone()
    noise[:, 5, 5] -= 1
    assert 0.4 < float(noise.std()) < 0.6


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"before": (0, 3)}, r"MultiTokenAttention\.before = \(0, 3\)"),
        ({"before": (2, 4)}, r"an odd number of key columns"),
        ({"after": (2, 2)}, r"MultiTokenAttention\.after"),
        ({"groups_before": 0}, r"MultiTokenAttention\.groups_before"),
        ({"groups_after": 0}, r"MultiTokenAttention\.groups_after"),
        ({"spread": -1.0}, r"MultiTokenAttention\.spread"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        MultiTokenAttention(**settings)  # type: ignore[arg-type]


def test_groups_part_the_heads() -> None:
    layer = Layer(number=3, heads=9, kv_heads=3, head_dim=8, value_dim=8, width=32)
    with pytest.raises(FieldError, match=r"groups_after = 2: must divide the 9 heads of layer 3"):
        MultiTokenAttention(groups_after=2).parameters(layer)
