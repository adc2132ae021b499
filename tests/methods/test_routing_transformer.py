"""Routing attention: who is in which cluster, who sees whom, and how means move, in loops over heads and tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, SiteError
from heedful.core.flags import meets
from heedful.core.mask import Mask
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods import RoutingTransformer
from heedful.methods.mechanisms.routed.routing_transformer import _words

TEXT = torch.ones(2, 19, dtype=torch.bool)
TEXT[0, :6] = False
WHOLE = torch.ones_like(TEXT)


def _bare(clusters: int, text: Tensor | None = None) -> tuple[Bare, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    counts = 1 + torch.rand(4, clusters, generator=draw, dtype=torch.float64)
    sums = torch.randn(4, clusters, 8, generator=draw, dtype=torch.float64)
    bare = Bare(dtype=torch.float64, text=text)
    bare.call = replace(bare.call, training=False)
    return bare, {"sums": sums, "counts": counts}


def _even(x: Tensor) -> Tensor:
    """One token's channels, less their mean and over their spread."""
    spread = ((x - x.mean()) ** 2).mean()
    return (x - x.mean()) / torch.sqrt(spread + 1e-5)


def _means(p: dict[str, Tensor]) -> Tensor:
    return p["sums"].detach() / p["counts"].detach()[..., None]


def _taken(rows: dict[int, Tensor], mean: Tensor, size: int) -> set[int]:
    """The tokens nearest to a mean."""
    return set(sorted(rows, key=lambda i: -float(rows[i].detach() @ mean))[:size])


def _by_hand(bare: Bare, p: dict[str, Tensor], clusters: int, text: Tensor, causal: bool = True) -> Tensor:
    out = torch.zeros_like(bare.q)
    for b in range(2):
        tokens = [i for i in range(19) if text[b, i]]
        size = max(len(tokens) // clusters, 1)
        for h in range(4):
            q = {i: _even(bare.q[b, h, i]) for i in tokens}
            k = {i: _even(bare.k[b, h // 2, i]) for i in tokens}
            groups = [(_taken(q, mean, size), _taken(k, mean, size)) for mean in _means(p)[h]]
            for i in tokens:
                seen = {j for asking, giving in groups if i in asking for j in giving if j <= i or not causal}
                if seen:
                    order = sorted(seen)
                    scores = torch.stack([q[i] @ k[j] for j in order]) / math.sqrt(8)
                    out[b, h, i] = scores.softmax(0) @ bare.v[b, h // 2, order]
    return out


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("clusters", [1, 3, 30])
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_see_those_of_their_clusters(padded: bool, clusters: int, backend: str) -> None:
    bare, params = _bare(clusters, TEXT if padded else None)
    found, _ = bare.run(RoutingTransformer(clusters), backend, 5 if backend == "tiled" else None, params)
    wanted = _by_hand(bare, params, clusters, TEXT if padded else WHOLE)
    assert bool(wanted.any())
    assert close(found, wanted)


def test_images_have_no_order() -> None:
    bare, params = _bare(3)
    bare.call = replace(bare.call, mask=Mask())
    found, _ = bare.run(RoutingTransformer(3), "reference", params=params)
    assert close(found, _by_hand(bare, params, 3, WHOLE, causal=False))


@pytest.mark.parametrize("padded", [False, True])
def test_the_first_steps_loss_and_gradient_and_where_the_means_go(padded: bool) -> None:
    text = TEXT if padded else WHOLE
    bare, params = _bare(3, TEXT if padded else None)
    leaves = [bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    bare.call = replace(bare.call, training=True)
    before = {name: x.clone() for name, x in params.items()}
    found, _ = bare.run(RoutingTransformer(3, decay=0.7), "tiled", 5, params)
    losses = [(x - 1).pow(2).mean() for x in (found, _by_hand(bare, before, 3, text))]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)
    with torch.no_grad():
        sums, counts = (torch.zeros_like(before[name]) for name in ("sums", "counts"))
        for b, i in text.nonzero().tolist():
            for h in range(4):
                for x in (_even(bare.q[b, h, i]), _even(bare.k[b, h // 2, i])):
                    nearest = int(torch.stack([x @ mean for mean in _means(before)[h]]).argmax())
                    sums[h, nearest] += x
                    counts[h, nearest] += 1
    assert close(params["sums"], 0.7 * before["sums"] + 0.3 * sums)
    assert close(params["counts"], 0.7 * before["counts"] + 0.3 * counts)


def test_at_rest_the_means_stay() -> None:
    bare, params = _bare(3)
    bare.q.requires_grad_(True)
    before = {name: x.clone() for name, x in params.items()}
    bare.run(RoutingTransformer(3), "reference", params=params)
    assert all(torch.equal(x, before[name]) for name, x in params.items())


def test_new_tokens_choose_among_all_so_far() -> None:
    """The last rows of a text read at once, and read alone behind the others; after a crop too."""
    bare, params = _bare(3)
    method, q, k = RoutingTransformer(3), _even_all(bare.q), _even_all(bare.k)
    call = replace(bare.call, params=params, query=q, key=k, state=State())
    wanted = method.route(Mask(), call).keeps(call.tile(slice(17, 19), slice(0, 19)).pairs)
    state = State()
    for first, stop in ((0, 16), (14, 17), (17, 19)):
        queries, keys = Positions.row(first, stop - first), Positions.row(0, stop)
        part = replace(call, queries=queries, keys=keys, query=q[:, :, first:stop], key=k[:, :, :stop], state=state)
        mask = method.route(Mask(), part)
    assert wanted is not None
    assert bool(wanted.any())
    assert torch.equal(mask.keeps(part.tile(slice(0, 2), slice(0, 19)).pairs), wanted)


def _even_all(x: Tensor) -> Tensor:
    return torch.stack([_even(row) for row in x.flatten(0, -2)]).view_as(x)


def test_queries_that_were_read_without_it_are_in_no_cluster() -> None:
    _, params = _bare(3)
    short = Bare(Shape(q=6), dtype=torch.float64)
    call = replace(short.call, params=params, query=short.q, key=short.k, state=State())
    mask = RoutingTransformer(3).route(Mask(), call)
    assert bool(mask.keeps(call.tile(slice(0, 6), slice(0, 19)).pairs).any(-1).all())  # type: ignore[union-attr]


def test_it_goes_beside_local_heads() -> None:
    model = models.tiny("mha").eval()
    ids = models.tiny_inputs(model, length=13)["input_ids"]
    with attach(model, RoutingTransformer(4).on(heads=[1, 2])) as run, torch.no_grad():
        assert run.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_the_start() -> None:
    layer = Layer(0, 4, 2, 64, 64, 32)
    found, again = RoutingTransformer(5).parameters(layer), RoutingTransformer(5).parameters(layer)
    assert torch.equal(found["counts"], torch.ones(4, 5))
    assert torch.equal(found["sums"], again["sums"])
    assert not torch.equal(found["sums"], RoutingTransformer(5).parameters(replace(layer, number=1))["sums"])
    assert close(found["sums"].norm(dim=-1), torch.full((4, 5), 8.0), 512)
    assert float(found["sums"].mean(-1).abs().max()) < 1e-6


def test_errors() -> None:
    bare, params = _bare(16)
    assert RoutingTransformer().idle(replace(bare.call, cross=True))
    assert not RoutingTransformer().idle(bare.call)
    for lost in ({"query": None, "key": bare.k}, {"query": bare.q, "key": None}):
        with pytest.raises(SiteError, match="queries and keys that route are known from MASK on"):
            RoutingTransformer().route(Mask(), replace(bare.call, params=params, **lost))
    with pytest.raises(FieldError, match=r"RoutingTransformer.clusters = 0: must be 1 or more"):
        RoutingTransformer(0)
    for decay in (1.0, -0.1):
        with pytest.raises(FieldError, match=r"RoutingTransformer.decay = .*: must be 0 or more, and below 1"):
            RoutingTransformer(decay=decay)


@pytest.mark.parametrize("clusters", [1, 16, 17, 70])
def test_tokens_meet_in_any_of_many_clusters(clusters: int) -> None:
    torch.manual_seed(0)
    one, other = (torch.rand(2, 3, clusters, 9) < 1.5 / clusters for _ in range(2))
    words = zip(_words(one), _words(other), strict=True)
    found = meets(*((a[..., None], b[:, :, None]) for a, b in words))
    assert torch.equal(found, one.float().mT @ other.float() > 0)
