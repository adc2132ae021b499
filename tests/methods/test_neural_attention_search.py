"""NAtS: types, who sees what, what it costs and what the first step learns, all by loops over the authors' formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import jvp

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import CachedKV, Call, Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Mask
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods import NeuralAttentionSearch

N, KINDS = 11, 3
LEFT = torch.arange(N) >= torch.tensor([0, 4])[:, None]
RIGHT = torch.arange(N) < torch.tensor([N, 6])[:, None]


def _bare(shape: Shape | None = None, training: bool = True, **settings: object) -> tuple[Bare, dict[str, Tensor]]:
    bare = Bare(shape or Shape(q=N, k=N), dtype=torch.float64, **settings)  # type: ignore[arg-type]
    bare.call = replace(bare.call, training=training)
    draw = torch.Generator().manual_seed(1)
    return bare, {"type": 0.3 * torch.randn(bare.shape.g, KINDS, 24, generator=draw, dtype=torch.float64)}


def _types(bare: Bare, weight: Tensor, seed: int = 0) -> Tensor:
    """One of three by token and key head `[b g n 3]`, with the gradient of a softmax; the first token's is global."""
    s, call = bare.shape, bare.call
    logits = torch.einsum("bne,gte->bgnt", bare.hidden, weight)
    if call.training:
        draw = torch.Generator().manual_seed(1_000_003 * seed + call.depth * call.forward + call.layer)
        logits = logits - torch.empty(s.b, s.g, s.k, KINDS, dtype=torch.float64).exponential_(generator=draw).log()
    soft = logits.softmax(-1)
    one = torch.nn.functional.one_hot(logits.argmax(-1), KINDS)
    types = one - soft.detach() + soft
    text = torch.ones(s.b, s.k, dtype=torch.bool) if bare.text is None else bare.text
    for b in range(s.b):
        types[b, :, ~text[b]] = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        types[b, :, int(text[b].long().argmax())] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    return types


def _sees(types: Tensor, b: int, g: int, i: int, j: int, window: int) -> Tensor:
    """Whether query i may see key j, as the sum over j's type of what each lets see."""
    kept, local, passing = types[b, g, j]
    alive = kept.new_ones(())
    for n in range(j + 1, i):
        alive = alive * (1 - types[b, g, n, 0])
    return kept + local * alive + passing * (i - j <= window)


def _maps(bare: Bare, types: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all keys, M, and the weights of the keys that are seen, `[b h n n]`."""
    s = bare.shape
    text = torch.ones(s.b, s.k, dtype=torch.bool) if bare.text is None else bare.text
    whole, seen = (torch.zeros(s.b, s.h, s.q, s.k, dtype=torch.float64) for _ in range(2))
    for b, h, i in itertools.product(range(s.b), range(s.h), range(s.q)):
        g = h // (s.h // s.g)
        there = [j for j in range(i + 1) if text[b, j]]
        if there:
            scores = torch.stack([bare.q[b, h, i] @ bare.k[b, g, j] / math.sqrt(s.d) for j in there])
            whole[b, h, i, there] = scores.softmax(0)
            seen[b, h, i, there] = torch.stack([_sees(types, b, g, i, j, window) for j in there])
    some = whole * seen.detach()
    total = some.sum(-1, keepdim=True)
    return whole, seen, some / total.where(total > 0, 1.0)


def _heads(bare: Bare, weights: Tensor) -> Tensor:
    return weights @ bare.v.repeat_interleave(bare.shape.h // bare.shape.g, 1)


SETTINGS: list[dict[str, object]] = [
    {}, {"text": LEFT}, {"text": RIGHT}, {"shape": Shape(g=4, q=N, k=N, dv=5)}, {"shape": Shape(h=3, g=1, q=N, k=N)}
]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("window", [1, 3, 40])
def test_the_formula(window: int, settings: dict[str, object], training: bool) -> None:
    bare, params = _bare(training=training, **settings)  # type: ignore[arg-type]
    want = _heads(bare, _maps(bare, _types(bare, params["type"], 5), window)[2])
    text = torch.ones(1, N, dtype=torch.bool) if bare.text is None else bare.text
    for backend, rows in (("reference", None), ("tiled", 2)):
        found, _ = bare.run(NeuralAttentionSearch(window, seed=5), backend, rows, params)
        assert close(found * text[:, None, :, None], want * text[:, None, :, None])


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_first_steps_gradient_is_the_authors(settings: dict[str, object]) -> None:
    """dM = softmax(s) (dA - D), of all keys; what M makes of the types is a product, whose rule tells the rest."""
    bare, params = _bare(**settings)  # type: ignore[arg-type]
    leaves = [bare.q, bare.k, bare.v]
    for x in (*leaves, params["type"]):
        x.requires_grad_(True)
    text = torch.ones(1, N, dtype=torch.bool) if bare.text is None else bare.text

    def loss(heads: Tensor) -> Tensor:
        return ((heads - 1).square() * text[:, None, :, None]).mean()

    found = loss(bare.run(NeuralAttentionSearch(2, sparsity=0.0), "tiled", 2, params)[0])
    whole, seen, weights = _maps(bare, _types(bare, params["type"]), 2)
    heads = _heads(bare, weights)
    want = loss(heads)
    assert close(found, want)
    (slope,) = torch.autograd.grad(want, heads, retain_graph=True)
    told = (slope @ bare.v.repeat_interleave(bare.shape.h // bare.shape.g, 1).mT).detach()
    of_mask = whole.detach() * (told - (weights.detach() * told).sum(-1, keepdim=True))
    (types,) = torch.autograd.grad((of_mask * seen).sum(), params["type"])
    grads = torch.autograd.grad(found, [*leaves, params["type"]])
    for one, other in zip(grads, (*torch.autograd.grad(want, leaves), types), strict=True):
        assert bool(other.any())
        assert close(one, other)


# torch scripts its own rules when a derivative is first carried forward
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_derivatives_carried_forward_are_those_of_the_way_back(settings: dict[str, object], backend: str) -> None:
    bare, params = _bare(**settings)  # type: ignore[arg-type]
    leaves = (params["type"], bare.q.clone())
    ways = [torch.randn_like(x) for x in leaves]

    def heads(weight: Tensor, q: Tensor) -> Tensor:
        bare.q = q
        return bare.run(NeuralAttentionSearch(2, sparsity=0.0), backend, 2, {"type": weight})[0]

    _, found = jvp(heads, leaves, tuple(ways))
    slope = torch.randn_like(found)
    for x in leaves:
        x.requires_grad_(True)
    back = torch.autograd.grad((heads(*leaves) * slope).sum(), leaves)
    assert close((found * slope).sum(), sum((x * way).sum() for x, way in zip(back, ways, strict=True)))
    with torch.no_grad(), dual_level():
        dual = unpack_dual(heads(*(make_dual(x.detach(), way) for x, way in zip(leaves, ways, strict=True))))
        assert close(dual.tangent, found)


def test_what_it_does_not_look_at_tells_it_nothing() -> None:
    """The layer's input is shown to what types tokens, and learns nothing by it."""
    bare, params = _bare()
    bare.hidden.requires_grad_(True)
    params["type"].requires_grad_(True)
    heads, _ = bare.run(NeuralAttentionSearch(2), "reference", params=params)
    assert torch.autograd.grad(heads.square().sum(), bare.hidden, allow_unused=True) == (None,)


def _ready(bare: Bare, params: dict[str, Tensor], method: NeuralAttentionSearch) -> Call:
    call = replace(bare.call, params=params, state=State())
    method.tell(bare.q, call)
    return call


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_lasting_tokens_cost(settings: dict[str, object]) -> None:
    bare, params = _bare(**settings)  # type: ignore[arg-type]
    s, weight = bare.shape, params["type"].requires_grad_(True)
    method = NeuralAttentionSearch(2, sparsity=0.7)
    found = method.shorten(Mask(), _ready(bare, params, method))
    types, want = _types(bare, weight), torch.zeros((), dtype=torch.float64)
    for b, h in itertools.product(range(s.b), range(s.h)):
        g = h // (s.h // s.g)
        mine = list(range(N)) if bare.text is None else bare.text[b].nonzero().flatten().tolist()
        for j in mine:
            kind = int(types[b, g, j].detach().argmax())
            later = [n for n in mine if n >= j and bool(types[b, g, n, 0] == 1)]
            until = min(later, default=mine[-1])
            lasting = (mine[-1] + 1 - j, until - j, 0)[kind]
            want = want + 0.7 * types[b, g, j, kind] * lasting / len(mine)
    assert close(found, want)
    assert close(*(torch.autograd.grad(x, weight)[0] for x in (found, want)))


def test_texts_that_share_a_row_cost_what_they_cost_alone() -> None:
    bare, params = _bare(training=False)
    method = NeuralAttentionSearch(2, sparsity=0.7)

    def cost(places: Positions, hidden: Tensor) -> Tensor:
        call = replace(bare.call, queries=places, keys=places, hidden=hidden, params=params, state=State())
        method.tell(bare.q, call)
        return method.shorten(Mask(), call)

    row = torch.arange(N)[None, None]
    packed = Positions(row, torch.cat([torch.arange(5), torch.arange(N - 5)])[None, None], 0)
    apart = [cost(Positions.row(0, x.shape[1]), x) for x in bare.hidden.split([5, N - 5], 1)]
    assert close(cost(packed, bare.hidden), sum(apart))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("text", [None, LEFT, RIGHT])
@pytest.mark.parametrize("window", [1, 3])
def test_a_cache_holds_what_the_next_token_sees(window: int, text: Tensor | None, groups: int) -> None:
    bare, params = _bare(Shape(g=groups, q=N, k=N), text=text)
    method, types = NeuralAttentionSearch(window), _types(bare, params["type"])
    call = _ready(bare, params, method)
    entries = CachedKV(bare.k, bare.v, bare.call.keys, N, None if text is None else text[:, None])
    found = method.drop(entries, call)
    for b, g in itertools.product(range(2), range(groups)):
        mine = torch.arange(N) if text is None else text[b].nonzero().flatten()
        following = torch.cat([types[b, g, mine], types[b, g, :1]])[None, None]  # what is not text counts for nothing
        want = [int(mine[j]) for j in range(len(mine)) if _sees(following, 0, 0, len(mine), j, window) > 0]
        assert found[b, g].nonzero().flatten().tolist() == want


@pytest.mark.parametrize("cuts", [(0, 9, 10, 11, 16), (0, 3, 4, 12, 16)])
def test_token_by_token_is_the_whole(cuts: tuple[int, ...]) -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=16)["input_ids"]
    with attach(model, NeuralAttentionSearch(2)) as run, torch.no_grad():
        for p in run.parameters():  # enough of every type
            p.mul_(8)
        whole, cache, parts = run(input_ids=ids).logits, None, []
        pairs = run.activity().density
        for start, stop in itertools.pairwise(cuts):
            out = run(input_ids=ids[:, start:stop], use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            parts.append(out.logits)
        kept = run.activity().kept
    assert close_model(torch.cat(parts, 1), whole)
    assert all(0.1 < share < 0.4 for share in pairs.values())
    assert all(0.1 < held / all_of_them < 0.9 for held, all_of_them in kept.values())


def test_training_sees_what_rest_does_where_types_are_beyond_doubt() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=16)["input_ids"]
    with attach(model, NeuralAttentionSearch(2)) as run, torch.no_grad():
        for p in run.parameters():
            p.mul_(1e6)
        at_rest, training = (run.model.train(x)(input_ids=ids, use_cache=False).logits for x in (False, True))
    assert close_model(training, at_rest)


def test_in_training_types_are_drawn_as_often_as_they_are_likely() -> None:
    bare, _ = _bare(Shape(b=1, g=1, h=1, q=4000, k=4000))
    bare.call = replace(bare.call, hidden=torch.ones(1, 4000, 24, dtype=torch.float64))
    shares = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    params = {"type": (shares.log() / 24)[None, :, None].expand(1, 3, 24)}
    call = _ready(bare, params, NeuralAttentionSearch())
    drawn = call.state.cache["types"][0, 0, 1:].mean(0)
    assert bool(((drawn - shares).abs() < 0.03).all())


def test_each_forward_layer_and_seed_draws_its_own() -> None:
    bare, params = _bare(depth=2)

    def drawn(method: NeuralAttentionSearch, **facts: int) -> Tensor:
        call = replace(bare.call, params=params, state=State(), **facts)
        method.tell(bare.q, call)
        return call.state.cache["types"]

    first = drawn(NeuralAttentionSearch())
    assert torch.equal(first, drawn(NeuralAttentionSearch(3)))
    others = [drawn(NeuralAttentionSearch(), layer=1), drawn(NeuralAttentionSearch(), forward=1)]
    others += [drawn(NeuralAttentionSearch(seed=1)), drawn(NeuralAttentionSearch(), forward=1, layer=1)]
    for one, other in itertools.combinations([first, *others], 2):
        assert not torch.equal(one, other)


def test_tokens_that_were_read_without_it_are_kept_for_good() -> None:
    bare, params = _bare(Shape(q=4, k=N), training=False)
    method = NeuralAttentionSearch(1)
    call = _ready(bare, params, method)
    mask = method.hide(call.mask, call)
    keep = mask.keeps(bare.call.tile(slice(0, 4), slice(0, N)).pairs)
    assert keep is not None
    assert bool(keep[..., : N - 4].all())
    assert not bool(keep.expand(2, 4, 4, N)[..., N - 4 :].tril().eq(torch.ones(4, 4).tril().bool()).all())
    entries = CachedKV(bare.k, bare.v, bare.call.keys, 4)
    assert bool(method.drop(entries, call)[..., : N - 4].all())


def test_what_is_hardly_seen_has_a_bounded_gradient() -> None:
    """Where all but a sliver of the weight is on a key that is hidden."""
    bare, _ = _bare(Shape(b=1, h=1, g=1, q=4, k=4, d=1, dv=1))
    bare.q, bare.k = torch.ones(1, 1, 4, 1, dtype=torch.float64), torch.zeros(1, 1, 4, 1, dtype=torch.float64)
    bare.k[0, 0, 1] = 80.0
    bare.hidden = torch.eye(4, 24, dtype=torch.float64)[None]
    weight = torch.zeros(1, 3, 24, dtype=torch.float64)
    weight[0, 2, 1] = 9.0  # which the last query, two tokens on, sees no more
    params = {"type": weight.requires_grad_(True)}
    heads, _ = bare.run(NeuralAttentionSearch(1), "reference", params=params)
    assert close(heads[0, 0, 3], bare.v[0, 0, [0, 2, 3]].mean(0))
    (grad,) = torch.autograd.grad(heads.sum(), weight)
    assert 0 < float(grad.abs().max()) < 10


def test_what_it_cannot_serve() -> None:
    bare, params = _bare()
    method = NeuralAttentionSearch()
    assert method.idle(replace(bare.call, cross=True))
    assert not method.idle(bare.call)
    with pytest.raises(SiteError, match="NeuralAttentionSearch, layer 0: the block is not handed hidden states"):
        method.tell(bare.q, replace(bare.call, params=params, hidden=None))
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: NeuralAttentionSearch(0), r"window = 0: must be 1 or more"),
        (lambda: NeuralAttentionSearch(sparsity=-1.0), r"sparsity = -1\.0: must be 0 or more"),
        (lambda: NeuralAttentionSearch(sparsity=math.inf), r"sparsity"),
    ]
    for make, match in wrong:
        with pytest.raises(FieldError, match=match):
            make()
    assert NeuralAttentionSearch(1, 0.0) is not None
    assert (method.window, method.sparsity, method.seed) == (16, 5e-7, 0)


def test_the_start() -> None:
    layer = Layer(0, 4, 2, 8, 8, 400)
    weight = NeuralAttentionSearch().parameters(layer)["type"]
    assert weight.shape == (2, 3, 400)
    assert torch.equal(weight, NeuralAttentionSearch().parameters(layer)["type"])
    assert not torch.equal(weight, NeuralAttentionSearch().parameters(replace(layer, number=1))["type"])
    assert 0.049 < float(weight.max()) <= 0.05
    assert -0.05 <= float(weight.min()) < -0.049
