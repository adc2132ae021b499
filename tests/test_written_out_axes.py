"""Where sizes do not tell which axis holds the heads, a look does; and a look leaves everything as it was."""

from __future__ import annotations

from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

import heedful
from heedful.adapters.choosing import adapter_for
from heedful.adapters.kvcache import hold
from heedful.conformance.tolerances import close
from heedful.core.errors import NotEntered, RefusedModel
from heedful.core.sites import Site
from heedful.engine.leaving import as_it_was
from tests.interrupting import interrupted
from tests.test_written_out import HALVE, Attention, D, H, N, Net, Writes
from tests.test_written_out_refused import product

pytestmark = pytest.mark.filterwarnings("ignore::heedful.core.errors.InactiveWarning")
SECOND = torch.tensor([1.0, 0.5, 1.0, 1.0]).view(1, H, 1, 1)


def heads_first(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    return (product(q, k).softmax(-1) @ v).transpose(0, 1), None


def heads_first_in_torchs(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1), None


def heads_outermost(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Heads and texts in one axis, all texts of a head one after another."""
    q, k, v = (torch.cat(t.unbind(1)) for t in (q, k, v))
    heads = product(q, k).softmax(-1) @ v
    return torch.stack(heads.chunk(H), 1), None


def rows_outermost(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The same with all heads of a text one after another."""
    q, k, v = (t.reshape(-1, N, D) for t in (q, k, v))
    return (product(q, k).softmax(-1) @ v).view(-1, H, N, D), None


def as_torch_has_it(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return product(q, k).softmax(-1) @ v, None


def one_head(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    q, k, v = (t.transpose(1, 2).flatten(2)[:, None] for t in (q, k, v))
    return (product(q, k).softmax(-1) @ v).transpose(1, 2), None


def in_windows(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """`[b h w n d]`, where windows are as many as heads."""
    q, k, v = (torch.stack([t, t.flip(2), t.roll(1, 2), t.roll(2, 2)], 2) for t in (q, k, v))
    return (product(q, k).softmax(-1) @ v)[:, :, 0], None


def keys_of_the_stream(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Queries that are learned, with the heads first."""
    asks = net.q.weight.view(H, 1, D, H * D)[:, :, :N, :D].expand(H, len(k), N, D)
    k, v = (t.transpose(0, 1) for t in (k, v))
    return (product(asks, k).softmax(-1) @ v).transpose(0, 1), None


TWO_AXES = [heads_first, heads_first_in_torchs, as_torch_has_it, keys_of_the_stream]
WAYS = [(w, H) for w in (*TWO_AXES, heads_outermost, rows_outermost, in_windows)] + [(w, None) for w in TWO_AXES]


@pytest.mark.parametrize(("writes", "told"), WAYS)
def test_a_head_is_a_head_where_there_are_as_many_texts(writes: Writes, told: int | None) -> None:
    def also(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return writes(net, q, k, v)[0] * SECOND, None

    torch.manual_seed(0)
    x, net, other = torch.randn(H, N, H * D), Net(writes).eval(), Net(also).eval()
    other.load_state_dict(net.state_dict())
    for layer in net.layers:
        layer.num_heads = told
    with heedful.attach(net, HALVE.on(heads=[1]), inputs=x) as run:
        assert close(run(x), other(x))
        assert close(run(x[:2]), other(x[:2]))  # what the look told holds for other numbers of texts


def test_one_head_of_one_text_is_wherever_it_is() -> None:
    torch.manual_seed(0)
    x, net = torch.randn(1, N, H * D), Net(as_torch_has_it).eval()
    for layer in net.layers:
        layer.num_heads, layer.writes = 1, one_head
    with heedful.attach(net, HALVE, inputs=x) as run:
        assert run.layer_names == ("layers.0", "layers.1")


def test_heads_that_stand_first_do_so_in_one_text() -> None:
    torch.manual_seed(0)
    x, net = torch.randn(1, N, H * D), Net(heads_first).eval()
    for layer in net.layers:
        layer.num_heads = None
    seen: list[int] = []
    note = heedful.edit(Site.PATTERN, lambda pattern, call: seen.append(pattern.shape[1]) or pattern)
    with heedful.attach(net, note, inputs=x) as run:
        run(x)
    assert set(seen) == {H}


def as_there_are_texts(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return (heads_first if len(q) == 1 else as_torch_has_it)(net, q, k, v)


def test_what_one_text_told_is_not_held_against_sizes() -> None:
    torch.manual_seed(0)
    x, net, seen = torch.randn(2, N, H * D), Net(as_there_are_texts).eval(), []
    note = heedful.edit(Site.PATTERN, lambda pattern, call: seen.append(pattern.shape[1]) or pattern)
    with heedful.attach(net, note, inputs=x[:1]) as run:
        run(x)
    assert set(seen) == {H}


@pytest.mark.parametrize("writes", [heads_outermost, rows_outermost])
def test_one_text_does_not_tell_what_several_share_an_axis_by(writes: Writes) -> None:
    torch.manual_seed(0)
    x, net = torch.randn(2, N, H * D), Net(writes).eval()
    with heedful.attach(net, HALVE, inputs=x[:1]) as run:
        run(x[:1])
        with pytest.raises(NotEntered, match="2 texts and 4 heads in one axis"):
            run(x)


def test_what_nothing_tells_is_refused() -> None:
    def mixed(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """Each text is the mean of all."""
        return as_torch_has_it(net, *(t.mean(0, keepdim=True).expand_as(t) for t in (q, k, v)))

    torch.manual_seed(0)
    x, net = torch.randn(H, N, H * D), Net(mixed).eval()
    with pytest.raises(RefusedModel, match="its sizes do not tell whether heads or texts stand first"):
        heedful.attach(net, HALVE, inputs=x)
    with heedful.attach(net, HALVE, inputs=x[:3]) as run:
        assert run.layer_names == ("layers.0", "layers.1")


class Pointwise(nn.Module):
    """Attention over `[b e n]`, with convolutions for projections."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = H, nn.Conv1d(H * D, 3 * H * D, 1), nn.Conv1d(H * D, H * D, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, H, D, -1).mT.unbind(1)
        return self.proj((product(q, k).softmax(-1) @ v).mT.reshape(x.shape))


def test_channels_before_tokens_are_told_apart() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Sequential(Pointwise()), nn.Sequential(Pointwise())).eval(), torch.randn(2, H * D, N)
    first = heedful.edit(Site.HIDDEN, lambda hidden, call: hidden * (torch.arange(N) > 0)[:, None])
    with heedful.attach(net, first, inputs=x) as run:
        found = run(x)
    seen = (torch.arange(N) > 0).float()
    assert close(found, net[1](net[0](x * seen) * seen))
    assert adapter_for(net, inputs=x).sizes()[0].width == H * D


def of_every_second(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    heads, _ = as_torch_has_it(net, q[:, :, ::2], k, v)
    return heads.repeat_interleave(2, 2)[:, :, :N], None


def test_fewer_queries_than_tokens_are_no_channels() -> None:
    torch.manual_seed(0)
    net, x, seen = Net(of_every_second).eval(), torch.randn(2, N, H * D), []
    note = heedful.edit(Site.HIDDEN, lambda hidden, call: seen.append(tuple(hidden.shape)) or hidden)
    with heedful.attach(net, note, inputs=x) as run:
        run(x)
    assert set(seen) == {(2, N, H * D)}


# a look leaves everything as it was


class Past:
    """A cache of a caller's own class."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.held: dict[str, list[Tensor]] = {"values": []}
        self.room, self.length = torch.zeros(16), torch.zeros((), dtype=torch.long)

    def add(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = k if self.keys is None else torch.cat([self.keys, k], 2)
        self.held["values"].append(v)
        self.length += k.shape[2]
        self.room[self.length] = 1.0
        return self.keys, torch.cat(self.held["values"], 2)


class Remembers(nn.Module):
    """Attention over what was read before, too; in a cache that it is handed, or in one that it has."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.attn, self.past, self.turns = Attention(as_torch_has_it), Past() if own else None, 0

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        self.turns += 1
        held = self.past if past is None else past
        self.attn.writes = lambda net, q, k, v: as_torch_has_it(net, q, *held.add(k, v))
        return self.attn(x)


@pytest.mark.parametrize("own", [False, True], ids=["handed over", "its own"])
@pytest.mark.parametrize("how", ["first", "inputs", "inference"])
def test_a_look_writes_into_no_cache(own: bool, how: str) -> None:
    torch.manual_seed(0)
    net, x = Remembers(own).eval(), torch.randn(2, 2 * N, H * D)
    told = [{} if own else {"past": Past()} for _ in range(2)]
    other = Remembers(own).eval()
    other.load_state_dict(net.state_dict())
    inputs = {"x": x[:, :N], **told[0]} if how == "inputs" else None
    same = heedful.edit(Site.PATTERN, lambda pattern, call: pattern + 0.0)
    with torch.inference_mode(how == "inference"), heedful.attach(net, same, inputs=inputs) as run:
        for part in x.split(N, 1):
            assert close(run(part, **told[0]), other(part, **told[1]))
    past = net.past if own else told[0]["past"]
    assert past.keys.shape[2] == int(past.length) == 2 * N
    assert past.room.nonzero().flatten().tolist() == [N, 2 * N]
    assert net.turns == 2


def test_positions_go_on_behind_a_cache_of_a_callers_own() -> None:
    torch.manual_seed(0)
    net, x, past, places = Remembers(False).eval(), torch.randn(2, N + 1, H * D), Past(), []
    note = heedful.edit(Site.QUERY, lambda q, call: places.append(call.queries.position.flatten().tolist()) or q)
    with heedful.attach(net, note) as run:
        run(x[:, :N], past)
        run(x[:, N:], past)
    assert places == [list(range(N)), [N]]


@pytest.mark.parametrize("kind", [list, set, tuple])
def test_what_a_model_writes_into_containers_is_taken_back(kind: Any) -> None:
    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.seen = Attention(as_torch_has_it), kind([1]) if kind is not tuple else ([1],)

        def forward(self, x: Tensor, order: dict[str, int]) -> Tensor:
            (self.seen.append if kind is list else self.seen.add if kind is set else self.seen[0].append)(2)
            order["last"] = order.pop("first", 0)
            self.made = x
            return self.attn(x)

    net, order = Notes().eval(), {"first": 1}
    x = torch.randn(2, N, H * D)
    heedful.attach(net, HALVE, inputs=(x, order)).close()
    assert net.seen == (kind([1]) if kind is not tuple else ([1],))
    assert order == {"first": 1}
    assert not hasattr(net, "made")


@pytest.mark.parametrize("own", [False, True], ids=["handed over", "its own"])
def test_a_look_draws_no_number_that_the_model_would_draw(own: bool) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.drawn = Attention(as_torch_has_it), torch.Generator().manual_seed(3) if own else None

        def forward(self, x: Tensor, drawn: torch.Generator | None = None) -> Tensor:
            return self.attn(x + torch.randn(x.shape, generator=drawn or self.drawn))

    torch.manual_seed(0)
    net, x = Noisy().eval(), torch.randn(2, N, H * D)
    other = Noisy().eval()
    other.load_state_dict(net.state_dict())
    given = [() if own else (torch.Generator().manual_seed(3),) for _ in range(2)]
    same = heedful.edit(Site.PATTERN, lambda pattern, call: pattern + 0.0)
    with heedful.attach(net, same) as run:
        assert close(run(x, *given[0]), other(x, *given[1]))


def test_a_look_leaves_buffers_as_they_were() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention(as_torch_has_it)
            self.register_buffer("seen", torch.zeros(3))
            self.register_buffer("still", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1.0)
            return self.attn(x)

    for inference in (False, True):
        with torch.inference_mode(inference):
            net = Counts().eval()
            still = net.still
            heedful.attach(net, HALVE, inputs=torch.randn(2, N, H * D)).close()
            assert net.seen.tolist() == [0.0, 0.0, 0.0]
            assert net.still is still
            assert inference or net.still._version == 0  # what nobody wrote into is not written into


def test_parts_that_know_their_sizes_since_a_look_keep_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.LazyLinear(H * D), Attention(as_torch_has_it)).eval()
    x = torch.randn(2, N, 5)
    with heedful.attach(net, HALVE, inputs=x) as run:
        assert run(x).shape == (2, N, H * D)
    assert type(net[0]) is nn.Linear
    assert net[0].in_features == 5


def test_a_look_writes_into_no_cache_that_a_run_has_made_its_own() -> None:
    cache, new = DynamicCache(), torch.randn(2, H, 3, D)
    hold(cache, 0, "layers.0")
    cache.update(new, new, 0)
    with as_it_was(nn.Module(), {"cache": cache}):
        cache.update(new, new, 0)
        assert cache.get_seq_length() == 6
    assert cache.get_seq_length() == cache.layers[0].keys.shape[2] == 3


def test_a_look_that_is_broken_off_leaves_all_as_it_was_too() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.read = nn.Linear(4, 4), [torch.zeros(1)]

        def forward(self, x: Tensor) -> Tensor:
            self.read[0] += 1
            self.read.append(x)
            raise ValueError("it wants more")

    net = Broken()
    with pytest.raises(ValueError, match="it wants more"):
        heedful.attach(net, HALVE, inputs=torch.ones(2, 4))
    assert len(net.read) == 1
    assert net.read[0] == 0


def test_an_interrupt_on_the_way_back_leaves_all_as_it_was_too() -> None:
    class Keeping(Attention):
        def __init__(self) -> None:
            super().__init__(as_torch_has_it)
            self.first, self.read = torch.zeros(1), [torch.zeros(1)]

        def forward(self, x: Tensor) -> Tensor:
            self.first += 1
            self.read.append(x)
            self.last = x
            return super().forward(x)

    def coming_back(frame: FrameType) -> bool:
        return frame.f_code.co_name == "undo" and frame.f_globals["__name__"].startswith("heedful.engine.lea")

    x, at, go_on = torch.ones(2, N, H * D), 0, True
    while go_on:
        net = Keeping().eval()
        go_on = interrupted(at, partial(heedful.attach, net, HALVE, inputs=x), coming_back)
        assert (net.first.item(), len(net.read), hasattr(net, "last")) == (0, 1, False), at
        at += 1
    assert at > 20
