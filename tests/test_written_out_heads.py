"""Which axis holds the heads where no module tells how many there are, and key heads that several share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import heedful
from heedful.adapters.operations.layout import Layout
from heedful.conformance.tolerances import close
from heedful.core.errors import RefusedModel
from heedful.core.sites import Site

B, N, G, R, D = 2, 7, 2, 3, 4
H, E = G * R, G * R * D
HALVE = heedful.edit(Site.PATTERN, lambda pattern, call: pattern * 0.5)
Writes = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Self-attention with a number of key heads, which it does not tell; what its heads give is weighed at the end."""

    def __init__(self, writes: Writes, key_heads: int) -> None:
        super().__init__()
        self.writes = writes
        self.q, self.out = nn.Linear(E, E), nn.Linear(E, E)
        self.k, self.v = (nn.Linear(E, key_heads * D) for _ in "kv")
        self.weighs = torch.ones(H)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.writes(x, *(f(x) for f in (self.q, self.k, self.v))) * self.weighs[:, None]).flatten(2))


def one_key_head(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bnhd,bmd->bhnm", q.view(B, N, H, D), k).mul(D**-0.5).softmax(-1)
    return torch.einsum("bhnm,bmd->bnhd", weights, v)


def groups_by_letters(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.view(B, N, G, D) for x in (k, v))
    scores = torch.einsum("bngrd,bmgd->bgrnm", q.view(B, N, G, R, D), k) * D**-0.5
    scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("bgrnm,bmgd->bngrd", scores.softmax(-1), v).flatten(2, 3)


def groups_in_axes(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With a table for each head of a group."""
    q, k, v = (
        q.view(B, N, G, R, D).permute(0, 2, 3, 1, 4),
        *(x.view(B, N, G, 1, D).permute(0, 2, 3, 1, 4) for x in (k, v)),
    )
    table = torch.linspace(-1, 1, R * N * N).view(R, N, N)
    return ((q @ k.mT * D**-0.5 + table).softmax(-1) @ v).permute(0, 3, 1, 2, 4).flatten(2, 3)


def heads_before_texts(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (torch.stack(x.split(D, -1)) for x in (q, k, v))
    return ((q @ k.mT * D**-0.5).softmax(-1) @ v).permute(1, 2, 0, 3)


def texts_within_tokens(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in fairseq: tokens first, and the heads of a text beside one another."""
    q, k, v = (x.transpose(0, 1).contiguous().view(N, B * H, D).transpose(0, 1) for x in (q, k, v))
    heads = torch.bmm(torch.bmm(q * D**-0.5, k.mT).softmax(-1), v)
    return heads.transpose(0, 1).reshape(N, B, H, D).transpose(0, 1)


WAYS = [
    (one_key_head, 1),
    (groups_by_letters, G),
    (groups_in_axes, G),
    (heads_before_texts, H),
    (texts_within_tokens, H),
]


@pytest.mark.parametrize(("writes", "key_heads"), WAYS)
@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
def test_a_head_is_a_head(writes: Writes, key_heads: int, backend: str) -> None:
    net, x = nn.Sequential(Attention(writes, key_heads)).eval(), torch.randn(B, N, E)
    with torch.no_grad(), heedful.attach(net, HALVE.on(heads=[1, 3]), backend=backend) as run:
        found = run(x)
    net[0].weighs[[1, 3]] = 0.5
    with torch.no_grad():
        assert close(found, net(x))


@pytest.mark.parametrize(("writes", "key_heads"), WAYS)
def test_a_text_is_a_text(writes: Writes, key_heads: int) -> None:
    net, seen = nn.Sequential(Attention(writes, key_heads)).eval(), []
    look = heedful.edit(Site.PATTERN, lambda weights, call: seen.append(weights.detach()) or 2 * weights)
    with torch.no_grad(), heedful.attach(net, look) as run:
        both = torch.randn(B, N, E)
        run(both)
        run(both.flip(0))
    assert seen[0].shape == (B, H, N, N)
    assert close(seen[1], seen[0].flip(0))


def test_heads_in_the_rows_of_queries_are_refused() -> None:
    def in_rows(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q.view(B, N * H, D) @ k.mT).softmax(-1) @ v).view(B, N, H, D)

    net = nn.Sequential(Attention(in_rows, 1)).eval()
    with pytest.raises(RefusedModel, match="with heads in the rows of its queries"):
        heedful.attach(net, HALVE, inputs=torch.randn(B, N, E))


def test_rows_that_may_be_either_are_told_by_another_token() -> None:
    """Heads before texts, made one after another: no size tells them from texts before heads."""

    def cat(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.cat(x.split(D, -1)) for x in (q, k, v))
        return (torch.bmm(q, k.mT).softmax(-1) @ v).view(H, B, N, D).permute(1, 2, 0, 3)

    net, seen = nn.Sequential(Attention(cat, H)).eval(), []
    look = heedful.edit(Site.PATTERN, lambda weights, call: seen.append(weights.shape) or 2 * weights)
    with torch.no_grad(), heedful.attach(net, look) as run:
        run(torch.randn(B, N, E))
    assert seen == [(B, H, N, N)]


class Intermediates:
    """What x-transformers gives beside its heads."""

    def __init__(self, before: Tensor, after: Tensor) -> None:
        self.before, self.after = before, after


class Looked(nn.Module):
    """Scores and weights are copied, to be looked at, and the module goes on with those that were there."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.changes = changes

    def forward(self, x: Tensor) -> tuple[Tensor, Intermediates]:
        q, k, v = (f * x.unflatten(-1, (H, D)).transpose(1, 2) for f in (1.0, 1.1, 1.2))
        scores = torch.einsum("bhid,bhjd->bhij", q, k)
        before = scores.clone()
        if self.changes:
            scores.view(-1).mul_(torch.arange(scores.numel()))
        weights = scores.softmax(-1)
        held = Intermediates(before, weights.clone())
        return torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(2), held


def test_scores_may_be_copied_and_objects_hold_the_runs_weights() -> None:
    net, x = nn.Sequential(Looked(False)).eval(), torch.randn(B, N, E)
    y, held = net(x)
    with heedful.attach(net, HALVE) as run:
        found, now = run(x)
    assert close(found, 0.5 * y)
    assert close(now.before, held.before)
    assert close(now.after, 0.5 * held.after)


def test_scores_that_are_changed_after_they_were_copied_are_refused() -> None:
    net = nn.Sequential(Looked(True)).eval()
    with pytest.raises(RefusedModel, match="no product of queries and keys alone"):
        heedful.attach(net, HALVE, inputs=torch.randn(B, N, E))


def test_heads_in_groups_are_told_one_by_one() -> None:
    """Head `3 g + i` is number `i` of group `g`; what is the same for some stands in each, but for keys."""
    query = torch.randn(2, 2, 3, 5, 4)
    layout = Layout.of(query, 6, torch.randn(2, 5, 24))
    assert layout.grouped
    assert torch.equal(layout.unfold(layout.fold(query)), query)
    assert layout.fold(query[:, :, :1], keys=True).shape == (2, 2, 5, 4)
    for some in (query[:, :, :1], query[:, :1], query[:1, :, :1]):
        told = layout.fold(some)
        for g in range(2):
            for i in range(3):
                wanted = some[:, min(g, some.shape[1] - 1), min(i, some.shape[2] - 1)]
                assert torch.equal(told[:, 3 * g + i], wanted)
