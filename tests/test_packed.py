"""Keys and values that are held packed: small, given back as they were packed, and where the cache goes they go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.adapters.kvcache import HeldLayer, cache_bytes
from heedful.conformance.tolerances import close
from heedful.core.call import CachedKV, Call, Kept
from heedful.core.errors import InactiveWarning, SiteError
from heedful.core.method import Method
from heedful.core.packed import Packed, Packing, Rows
from heedful.core.sites import Site, at
from heedful.kit.packing import Channels, Codes
from heedful.methods.sparse.cache.kivi import KIVI
from heedful.methods.sparse.cache.knorm import KNorm
from heedful.methods.sparse.cache.think import ThinK
from heedful.tiny import tiny

from .samples import PAPER

GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def by_group(n: int = 6) -> Codes:
    return Codes.by_group(draw(n, 5), torch.arange(n) // 4 + 7, 2)


def by_row(n: int = 6) -> Codes:
    return Codes.by_row(draw(n, 5), 3, 4)


def channels(n: int = 6) -> Channels:
    held = torch.tensor([[True, False, True, False, True], [False, True, True, True, False]])
    return Channels.of(draw(n, 5), held, torch.arange(n) % 2)


def behind(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second])


KINDS: list[Callable[[int], Packed]] = [by_group, by_row, channels]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_taken_and_joined_as_those_of_a_tensor(kind: Callable[[int], Packed]) -> None:
    one, two = kind(6), kind(3)
    a, b = one.tensor(), two.tensor()
    assert len(one) == len(a) == 6
    assert one.shape == a.shape
    assert one.form == two.form
    assert torch.equal(one.join(two, behind).tensor(), torch.cat([a, b]))
    among = one.join(two, lambda old, new: torch.cat([old[:4], new, old[4:]]))
    assert torch.equal(among.tensor(), torch.cat([a[:4], b, a[4:]]))
    for which in ([4, 0, 0, 5], [], [0, 1, 2, 3, 4, 5]):
        chosen = torch.tensor(which, dtype=torch.long)
        assert torch.equal(one.take(chosen).tensor(), a[chosen])
        assert torch.equal(one.take(chosen).join(two, behind).take(torch.tensor([len(which)])).tensor(), b[:1])


def test_codes_are_the_nearest_of_even_steps() -> None:
    x = draw(8, 5)
    for bits in (2, 4, 8):
        found = Codes.by_group(x, torch.tensor([0, 0, 0, 3, 3, 3, 3, 3]), bits).tensor()
        for rows in (slice(0, 3), slice(3, 8)):
            low, high = x[rows].amin(0), x[rows].amax(0)
            steps = torch.stack([low + (high - low) * i / (2**bits - 1) for i in range(2**bits)])
            nearest = (steps[:, None] - x[rows]).abs().argmin(0)
            assert close(found[rows], steps.gather(0, nearest))
    short = Codes.by_row(x, 3, 8)  # a group of three channels, and one of two
    assert short.low.shape == (8, 2)
    assert torch.equal(short.low, torch.stack([x[:, :3].amin(1), x[:, 3:].amin(1)], 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_codes_keep_the_type_and_take_their_bits(dtype: torch.dtype) -> None:
    x = draw(64, 32).to(dtype)
    for found in (Codes.by_group(x, torch.zeros(64, dtype=torch.long), 2), Codes.by_row(x, 32, 2)):
        assert found.tensor().dtype == found.low.dtype == dtype
        assert found.codes.nbytes == 64 * 32 // 4
        assert float((found.tensor().double() - x.double()).abs().max()) <= 0.51 * float(found.step.max())
    assert Codes.by_row(torch.full((2, 4), 3.0, dtype=dtype), 4, 2).tensor().tolist() == [[3.0] * 4] * 2


def test_slots_grow_as_they_must() -> None:
    x = draw(40_000, 1)
    assert Codes.by_group(x[:256], torch.arange(256), 2).slot.dtype == torch.uint8  # type: ignore[union-attr]
    middle, large = Codes.by_group(x[:257], torch.arange(257), 2), Codes.by_group(x, torch.arange(40_000), 2)
    assert middle.slot is not None
    assert large.slot is not None
    assert (middle.slot.dtype, large.slot.dtype) == (torch.int16, torch.int32)
    assert torch.equal(large.tensor(), x)
    assert large.take(torch.arange(200)).low.shape == (200, 1), "scales that nobody needs are let go"
    assert torch.equal(middle.join(large, behind).tensor(), torch.cat([x[:257], x]))


def test_each_set_of_channels_is_held_once() -> None:
    one = channels(6)
    assert one.channel.tolist() == [[0, 2, 4], [1, 2, 3]]
    assert one.join(channels(4), behind).channel.shape == (2, 3)
    assert one.take(torch.tensor([1, 3])).channel.tolist() == [[1, 2, 3]]


def layer() -> tuple[HeldLayer, Tensor]:
    held, keys = HeldLayer(), draw(2, 2, 6, 5)
    held.update(keys, keys[..., :3])
    return held, keys


def pack(held: HeldLayer, those: Tensor, kind: type[Codes] | type[Channels]) -> Tensor:
    """Packs keys and gives what they should be from now on."""
    rows = held.keys[those]
    packed: Packed = Codes.by_row(rows, 5, 2)
    if kind is Channels:
        packed = Channels.of(rows, torch.tensor([[True, False, False, True, True]]), torch.zeros(len(rows)).long())
    wanted = held.keys.clone()
    wanted[those] = packed.tensor()
    held.keep(Kept(held.is_filled, Packing(those, packed)))
    return wanted


def test_a_layer_holds_parts_packed_and_gives_them_back() -> None:
    held, keys = layer()
    those = torch.zeros(2, 2, 6, dtype=torch.bool)
    those[0, :, :3] = those[1, 1, 1:5] = True
    wanted = pack(held, those, Codes)
    assert [type(x) for x in held._keys.packed] == [Codes]
    assert held._values.packed == ()
    assert torch.equal(held.keys, wanted)
    assert torch.equal(held.values, keys[..., :3])
    new = draw(2, 2, 2, 5)
    handed, _ = held.update(new, new[..., :3])
    wanted = torch.cat([wanted, new], 2)
    assert torch.equal(handed, wanted)
    assert held.holds(handed, held.values)
    again = torch.zeros(2, 2, 8, dtype=torch.bool)
    again[..., 2:5] = True  # some of them packed already, in another way
    wanted = pack(held, again, Channels)
    assert torch.equal(held.keys, wanted)
    assert [type(x) for x in held._keys.packed] == [Codes, Channels]
    held.reorder_cache(torch.tensor([1, 1, 0]))
    assert torch.equal(held.keys, wanted[[1, 1, 0]])
    held.batch_select_indices(torch.tensor([0, 2]))
    held.batch_repeat_interleave(2)
    assert torch.equal(held.keys, wanted[[1, 1, 0, 0]])
    held.crop(-2)
    assert torch.equal(held.keys, wanted[[1, 1, 0, 0], :, :6])
    assert torch.equal(copy.deepcopy(held).keys, held.keys)
    keep = held.is_filled.clone()
    keep[:, 0, :4] = False
    left = held.keys
    held.keep(Kept(keep))
    assert torch.equal(held.keys[:, 1], left[:, 1])
    assert torch.equal(held.keys[:, 0, 4:], left[:, 0, 4:])
    held.keep(Kept(held.is_filled, held.keys + 1))
    assert held._keys.packed == (), "what is written as a tensor is whole again"
    held.reset()
    assert held.get_seq_length() == 0


@pytest.mark.parametrize("counts", [[3, 3], [4, 1, 0, 6]])
def test_rows_stay_in_order_whatever_is_done_to_them(counts: list[int]) -> None:
    """Thirty things done at random, against a list of rows for each head."""
    rows = draw(sum(counts), 5)
    held, wanted = Rows(rows, counts), [list(x) for x in rows.split(counts)]
    for turn in range(30):
        flat = [x for head in wanted for x in head]
        if turn % 3 == 0:
            new = draw(1, len(wanted), 1 + turn % 2, 5)
            wanted = [head + list(more) for head, more in zip(wanted, new[0], strict=True)]
            held = held.append(new, [len(head) for head in wanted])
        elif turn % 3 == 1:
            those = torch.rand(len(flat), generator=GENERATOR) < (0.0, 0.5, 1.0)[turn // 3 % 3]
            kind = (by_row, channels)[turn % 2]
            packed = kind(int(those.sum()))
            held, given = held.put(those, packed), iter(packed.tensor())
            each = iter([next(given) if hit else x for hit, x in zip(those.tolist(), flat, strict=True)])
            wanted = [[next(each) for _ in head] for head in wanted]
        elif turn < 28:
            kept = torch.rand(len(flat), generator=GENERATOR) < 0.9
            each = iter(kept.tolist())
            wanted = [[x for x in head if next(each)] for head in wanted]
            held = held.take(kept.nonzero().flatten(), [len(head) for head in wanted])
        else:  # heads change places, and one is there twice
            number = iter(range(len(flat)))
            places = [[next(number) for _ in head] for head in wanted]
            order = [len(wanted) - 1, *range(len(wanted))]
            which = torch.tensor([x for i in order for x in places[i]])
            wanted = [wanted[i] for i in order]
            held = held.take(which, [len(head) for head in wanted])
        assert torch.equal(held.tensor(), torch.stack([x for head in wanted for x in head]))
        assert [sum(n for _, n in head) for head in held.runs] == [len(head) for head in wanted]
        assert all(a != b for head in held.runs for (a, _), (b, _) in pairwise(head)), "a run for each step"
    assert [type(x) for x in held.packed] == [Channels, Codes]


def test_nothing_may_be_left_of_rows() -> None:
    held = Rows(draw(4, 5), [2, 2]).put(torch.tensor([True, False, False, True]), by_row(2))
    nothing = held.take(torch.arange(0), [0, 0])
    assert nothing.tensor().shape == (0, 5)
    assert torch.equal(nothing.append(new := draw(1, 2, 1, 5), [1, 1]).tensor(), new[0, :, 0])


def test_what_is_packed_with_gradients_has_them() -> None:
    x = draw(4, 5).requires_grad_()
    rows = Rows(draw(6, 5), [3, 3]).put(torch.tensor([True, True, False, True, True, False]), Codes.by_row(x, 5, 8))
    rows.tensor().sum().backward()
    assert x.grad is not None
    assert x.grad.count_nonzero() == 8  # the lowest and highest of each row


class Pack(Method):
    """Packs the first entries' keys as one channel, or as told by `odd`, wrongly."""

    paper = PAPER
    chunk_invariant = False
    odd: str = ""

    @at(Site.CACHE)
    def pack(self, entries: CachedKV, call: Call) -> Kept:
        those = entries.is_filled & (entries.positions.position < 3)
        rows = entries.key[those] if self.odd != "rows" else entries.key[those][1:]
        rows = rows[:, 1:] if self.odd == "width" else rows
        held = torch.zeros(1, rows.shape[1], dtype=torch.bool)
        held[:, 1] = True
        packed = Channels.of(rows, held, torch.zeros(len(rows), dtype=torch.long))
        return Kept(entries.is_filled, Packing(those if self.odd != "shape" else those[:, :1], packed))


@torch.no_grad()
def test_steps_see_what_others_packed_and_heads_are_theirs() -> None:
    model, ids = tiny("llama"), torch.arange(3, 15)[None]
    plain = model(input_ids=ids)[CACHE].layers[0].keys
    with attach(model, Pack().on(heads=[0, 1])) as run:
        keys = run(input_ids=ids)[CACHE].layers[0].keys
    assert torch.equal(keys[:, 1], plain[:, 1])
    assert torch.equal(keys[:, 0, 3:], plain[:, 0, 3:])
    assert not keys[:, 0, :3, [0, 2, 3]].any()
    assert torch.equal(keys[:, 0, :3, 1], plain[:, 0, :3, 1])
    shortest = plain.clone()  # those that lost channels are shorter, so they are what KNorm keeps
    shortest[:, :, :3, [0, *range(2, plain.shape[3])]] = 0.0
    kept = shortest.norm(dim=-1).argsort(-1)[..., :3].sort(-1).values
    with attach(model, Pack() | KNorm(3)) as run:
        held = run(input_ids=ids)[CACHE].layers[0]
    assert torch.equal(held.index, kept)
    assert torch.equal(held.keys, shortest.gather(2, kept[..., None].expand(*kept.shape, plain.shape[3])))


@pytest.mark.parametrize("odd", ["rows", "width", "shape"])
def test_a_packing_of_other_rows_is_refused(odd: str) -> None:
    model = tiny("llama")
    with (
        pytest.raises(SiteError, match="a Packing of a key says which entries"),
        attach(model, Pack(odd)) as run,
    ):
        run(input_ids=torch.arange(3, 15)[None])


@torch.no_grad()
def test_memory_is_really_saved_and_told() -> None:
    model, ids = tiny("llama"), torch.randint(3, 90, (2, 66), generator=GENERATOR)
    whole = cache_bytes(model(input_ids=ids)[CACHE])
    for method, most in ((KIVI(2, 32, 32), 0.5), (ThinK(0.5, 2), 0.82), (KIVI(8, 32, 32), 0.6)):
        with attach(model, method) as run:
            cache = run(input_ids=ids)[CACHE]
            held = cache_bytes(cache)
            seen = run.activity()
        assert held < most * whole, method
        layers = [layer.nbytes for layer in cache.layers]
        assert [x for x, _ in seen.cache_bytes.values()] == layers
        assert sum(x for _, x in seen.cache_bytes.values()) == whole
        assert held >= sum(layers)
        assert f"cache memory: {sum(layers) / 2**20:.2f} of" in str(seen)


@torch.no_grad()
def test_a_method_says_why_a_text_is_left_as_it_is() -> None:
    model, ids = tiny("llama"), torch.arange(3, 15)[None]
    for method, told in (
        (KIVI(), "the newest 128 tokens are whole, and the text has 12"),
        (ThinK(), "the newest 32 tokens keep all channels, and the text has 12"),
        (KNorm(12), "there is room for 12 tokens, and the text has 12"),
    ):
        with pytest.warns(InactiveWarning, match=told), attach(model, method) as run:
            run(input_ids=ids)
        assert f"at CACHE: {told}" in run.inactive[0]
    assert not KNorm(11).rests(12)


def test_some_heads_of_a_packing_have_their_own_rows() -> None:
    rows = torch.arange(12.0).view(6, 2)
    packed = Channels.of(rows, torch.ones(1, 2, dtype=torch.bool), torch.zeros(6, dtype=torch.long))
    second = Packing(torch.ones(1, 2, 3, dtype=torch.bool), packed).among([1])
    assert torch.equal(second.over(torch.zeros(1, 2, 3, 2))[0], torch.stack([torch.zeros(3, 2), rows[3:]]))
