"""What written-out attention does beside its two products, and is served with: axes, tables, types, what it gives."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heedful
from heedful.conformance.tolerances import close
from heedful.core.sites import Site
from tests.test_written_out import HALVE, SAME, TWICE, Attention, B, D, H, N, Net, Writes, halved, plain, x
from tests.test_written_out_refused import product

__all__ = ["x"]
pytestmark = pytest.mark.filterwarnings("ignore::heedful.core.errors.InactiveWarning")
Pair = namedtuple("Pair", "y weights")


def bounded(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Between bounds that no score comes near, and from a mask on."""
    scores = torch.max(product(q, k).clamp(-5e4, 5e4), torch.tensor(torch.finfo(torch.float32).min))
    weights = scores.softmax(-1)
    return weights @ v, weights


def values_of_one_head(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Rows of heads for the scores, axes of their own for the values, of which there is one head."""
    scores = torch.bmm(q.reshape(B * H, N, D), k.reshape(B * H, N, D).transpose(1, 2)) / D**0.5
    weights = scores.softmax(-1).view(B, H, N, N)
    return weights @ v[:, :1], weights


def heads_first(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    weights = product(q, k).softmax(-1)
    return (weights @ v).transpose(0, 1), weights


def in_windows(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Each token is a window of its own tokens: `[b h w n d]`."""
    q, k, v = (torch.stack([t, t.flip(2)], 2) for t in (q, k, v))
    weights = product(q, k).softmax(-1)
    return (weights @ v)[:, :, 0], weights


def learned_queries(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Queries that all texts share."""
    asks = net.q.weight.view(1, H, D, H * D)[:, :, :N, :D]
    weights = product(asks, k).softmax(-1)
    return weights @ v, weights


def far_in_a_row(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """One query whose keys are all a hundred lower, which hides none; small numbers for the others."""
    added = torch.linspace(-0.01, 0.01, N).expand(N, N).clone()
    added[2] = -100.0
    weights = (product(q, k) + added).softmax(-1)
    return weights @ v, weights


def over_a_number_for_each_head(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.transpose(-1, -2) / (1 + net.table[:, :1, :1].exp())).softmax(-1)
    return weights @ v, weights


SERVED = [far_in_a_row, over_a_number_for_each_head, bounded, values_of_one_head]
SERVED += [heads_first, in_windows, learned_queries]


@pytest.mark.parametrize("writes", SERVED)
def test_weights_come_back_in_the_modules_own_axes(writes: Writes, x: Tensor) -> None:
    net, other = Net(writes, weights=True).eval(), Net(halved(writes), weights=True).eval()
    other.load_state_dict(net.state_dict())
    with heedful.attach(net, HALVE) as run:
        assert all(close(a, b) for a, b in zip(run(x), other(x), strict=True))


@pytest.mark.parametrize("writes", [heads_first, in_windows])
def test_a_head_is_a_head(writes: Writes, x: Tensor) -> None:
    only_second = torch.tensor([1.0, 0.5, 1.0, 1.0]).view(1, H, 1, 1)

    def also(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return writes(net, q, k, v)[0] * only_second, None

    net, other = Net(writes).eval(), Net(also).eval()
    other.load_state_dict(net.state_dict())
    with heedful.attach(net, HALVE.on(heads=[1])) as run:
        assert close(run(x), other(x))


def as_dict(y: Tensor, weights: Tensor) -> Any:
    return {"y": y, "weights": [weights]}


@pytest.mark.parametrize("form", [as_dict, Pair, lambda *both: list(both)], ids=["dict", "named", "list"])
def test_weights_are_given_in_any_form(form: Any, x: Tensor) -> None:
    class Given(Attention):
        def forward(self, x: Tensor) -> Any:
            return form(*super().forward(x))

    net = Given(plain, weights=True).eval()
    holder = nn.Sequential(net)
    want = net(x)
    with heedful.attach(holder, HALVE, inputs=x) as run:
        got = run(x)
    assert type(got) is type(want)
    given, own = (next(iter(z["weights"])) if isinstance(z, dict) else z[1] for z in (got, want))
    assert close(given, own * 0.5)


def kept(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    net.last = product(q, k).softmax(-1)
    return net.last @ v, None


def test_weights_that_a_module_keeps_are_the_runs(x: Tensor) -> None:
    net = Net(kept).eval()
    net(x)
    want = net.layers[0].last
    with heedful.attach(net, HALVE) as run:
        run(x)
    assert close(net.layers[0].last, want * 0.5)


def from_the_second_token(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """A table for all tokens but the first, as with a class token."""
    scores = product(q, k)
    scores[..., 1:, 1:] += net.table[:, 1:, 1:]
    weights = scores.softmax(-1)
    return weights @ v, weights


def through_a_view(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The same, and nothing is put back."""
    scores = product(q, k)
    scores[..., 1:, 1:].add_(net.table[:, 1:, 1:])
    weights = scores.softmax(-1)
    return weights @ v, weights


def beside_the_first_token(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The same in axes of rows and columns, as in MViT v2, and not in place."""
    scores = product(q, k)
    inner = scores[:, :, 1:, 1:].view(B, H, 2, 3, 2, 3) + net.table[:, 1:, 1:].reshape(H, 2, 3, 2, 3)
    scores[:, :, 1:, 1:] = inner.view(B, H, 6, 6)
    weights = scores.softmax(-1)
    return weights @ v, weights


def by_the_query(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """What is added is a product too, with a table."""
    scores = product(q, k)
    scores[:, :, 1:, 1:] = scores[:, :, 1:, 1:] + q[:, :, 1:, :N] @ net.table[:, :, 1:]
    weights = scores.softmax(-1)
    return weights @ v, weights


def with_a_table(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.transpose(-1, -2) * D**-0.5 + net.table).softmax(-1)
    return weights @ v, weights


@pytest.mark.parametrize(
    "writes", [from_the_second_token, through_a_view, by_the_query, beside_the_first_token, with_a_table]
)
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_each_number_of_a_table_learns(writes: Writes, start: float, x: Tensor) -> None:
    net = Net(writes)
    for layer in net.layers:
        layer.table.data *= start

    def gradient() -> Tensor:
        net.zero_grad()
        net(x).square().sum().backward()
        return net.layers[0].table.grad.clone()

    want = gradient()
    with heedful.attach(net, SAME, inputs=x):
        assert close(gradient(), want)


def in_full_precision(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q.float(), k.float()).softmax(-1).to(v.dtype)
    return weights @ v, weights


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_scores_may_be_more_precise_than_values(backend: str, x: Tensor) -> None:
    net, x = Net(in_full_precision).eval().bfloat16(), x.bfloat16()
    want = net(x)
    with heedful.attach(net, SAME, backend=backend) as run:
        got = run(x)
    assert got.dtype == torch.bfloat16
    assert close(got, want)


@pytest.mark.parametrize("writes", [plain, with_a_table])
def test_edits_act_under_autocast(writes: Writes, x: Tensor) -> None:
    net, other = Net(writes).eval(), Net(halved(writes)).eval()
    other.load_state_dict(net.state_dict())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        want = other(x)
        with heedful.attach(net, HALVE) as run:
            got = run(x)
    assert got.dtype == want.dtype
    assert float((got - want).abs().max()) < 0.05


@torch.inference_mode()
def test_tensors_that_have_no_versions_are_followed(x: Tensor) -> None:
    net, other = Net(plain, weights=True).eval(), Net(halved(plain), weights=True).eval()
    other.load_state_dict(net.state_dict())
    with heedful.attach(net, HALVE, inputs=x) as run:
        assert all(close(a, b) for a, b in zip(run(x), other(x), strict=True))


def test_dropouts_add_up(x: Tensor) -> None:
    from heedful.adapters.operations.written import Trail

    trail, q = Trail(), torch.randn(2, 3, 4, 5)
    scores = q @ q.mT
    trail.follow(torch.matmul, (q, q.mT), {}, scores)
    now = scores.softmax(-1)
    trail.follow(torch.softmax, (scores, -1), {}, now)
    for rate in (0.5, 0.2):
        later = F.dropout(now, rate)
        trail.follow(F.dropout, (now, rate, True), {}, later)
        now = later
    asked = trail.asked(torch.matmul, (now, q), {})
    assert abs(asked.dropout - 0.6) < 1e-9


class Around(nn.Module):
    """Attention of its own, after a part that has some too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.num_heads = Attention(plain), H
        self.out = nn.Linear(H * D, H * D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        q = x.view(*x.shape[:2], H, D).transpose(1, 2)
        return self.out((product(q, q).softmax(-1) @ q).transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_an_answer_is_not_followed_by_what_is_around_it(backend: str, x: Tensor) -> None:
    net = nn.Sequential(Around()).eval()
    with heedful.attach(net, SAME, backend=backend, inputs=x) as run:
        assert set(run.layer_names) == {"0.inner", "0"}
        assert close(run(x), net[0](x))


class Remembering(nn.Module):
    """Keys and values of what was read before are in a list that it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Attention(plain)

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(x)
        self.layer.writes = lambda net, q, *_: plain(net, q, *(self._heads(net, f, cache) for f in (net.k, net.v)))
        return self.layer(x)

    @staticmethod
    def _heads(net: Attention, f: nn.Module, cache: list[Tensor]) -> Tensor:
        return f(torch.cat(cache, 1)).unflatten(-1, (H, D)).transpose(1, 2)


def test_the_look_writes_to_no_list_that_is_handed_over(x: Tensor) -> None:
    net = Remembering().eval()
    held: list[Tensor] = []
    with heedful.attach(net, HALVE) as run:
        run(x, held)
    assert len(held) == 1


def test_a_softmax_of_something_else_is_left_to_the_module(x: Tensor) -> None:
    """Such as a gate over as many experts as there are tokens."""

    def gated(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        heads, _ = plain(net, q, k, v)
        return heads, net.table.expand(B, -1, -1, -1).softmax(-1)

    net = Net(gated, weights=True).eval()
    want = net(x)[1]
    with heedful.attach(net, HALVE) as run:
        assert torch.equal(run(x)[1], want)


@pytest.mark.parametrize("writes", [far_in_a_row, over_a_number_for_each_head, bounded, beside_the_first_token])
def test_queries_are_told_apart_from_what_is_added(writes: Writes, x: Tensor) -> None:
    def louder(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return writes(net, 2 * q, k, v)

    net, other = Net(writes).eval(), Net(louder).eval()
    other.load_state_dict(net.state_dict())
    with heedful.attach(net, TWICE) as run:
        assert close(run(x), other(x))


def test_a_block_in_place_of_the_module_may_be_attention_too(x: Tensor) -> None:
    def block(hidden: Tensor, call: Any) -> Tensor:
        weights = (hidden @ hidden.mT).softmax(-1)
        return weights @ hidden + F.scaled_dot_product_attention(hidden, hidden, hidden) + weights.sum(-1, keepdim=True)

    net = Net(plain).eval()
    with heedful.attach(net, heedful.edit(Site.BLOCK, block)) as run:
        assert close(run(x), twice(x, block))


def twice(x: Tensor, block: Any) -> Tensor:
    for _ in range(2):
        x = x + block(x, None)
    return x


class Maps(nn.Linear):
    """A linear map that is written as a product, as Falcon's are."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("weights", [False, True])
def test_maps_within_may_be_written_out_too(weights: bool, x: Tensor) -> None:
    net, other = Net(plain, weights).eval(), Net(halved(plain), weights).eval()
    other.load_state_dict(net.state_dict())
    for layer in net.layers:
        for name in ("q", "k", "v", "out"):
            getattr(layer, name).__class__ = Maps
    with heedful.attach(net, HALVE, inputs=x) as run:
        got, want = (z if weights else (z,) for z in (run(x), other(x)))
    assert all(close(a, b) for a, b in zip(got, want, strict=True))


class Reader:
    """What a module remembers outside of itself."""

    def __init__(self) -> None:
        self.read: list[Tensor] = []
        self.count = 0


class Keeping(nn.Module):
    """Keys and values of what was read before are its own: an attribute, a buffer, a list, or a place in a buffer."""

    memory: Tensor
    room: Tensor

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer, self.where, self.reader = Attention(plain), where, Reader()
        self.attribute: Tensor | None = None
        self.register_buffer("memory", torch.zeros(B, 0, H * D), persistent=False)
        self.register_buffer("room", torch.zeros(B, 4 * N, H * D), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "attribute":
            self.attribute = x if self.attribute is None else torch.cat([self.attribute, x], 1)
            seen = self.attribute
        elif self.where == "buffer":
            self.memory = seen = torch.cat([self.memory, x], 1)
        elif self.where == "list":
            self.reader.read.append(x)
            seen = torch.cat(self.reader.read, 1)
        else:
            self.room[:, self.reader.count : self.reader.count + N] = x
            self.reader.count += N
            seen = self.room[:, : self.reader.count]
        self.layer.writes = lambda net, q, *_: plain(net, q, *(self._heads(net, f, seen) for f in (net.k, net.v)))
        return self.layer(x)

    @staticmethod
    def _heads(net: Attention, f: nn.Module, seen: Tensor) -> Tensor:
        return f(seen).unflatten(-1, (H, D)).transpose(1, 2)


@pytest.mark.parametrize("where", ["attribute", "buffer", "list", "place"])
@pytest.mark.parametrize("told", [False, True], ids=["first forward", "inputs"])
def test_the_look_leaves_no_trace_in_what_modules_keep(where: str, told: bool, x: Tensor) -> None:
    net, alone = Keeping(where).eval(), Keeping(where).eval()
    alone.load_state_dict(net.state_dict())
    with torch.no_grad(), heedful.attach(net, SAME, inputs=x if told else None) as run:
        for step in (x, 2 * x):
            assert close(run(step), alone(step))
        assert run.difference(x) < 1e-6
        assert close(run(x), alone(x))
