"""The cache that may hold fewer entries than it has seen: bytes really freed, nothing else changed."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.adapters.kvcache import HeldLayer, cache_bytes
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import CachedKV, Call, Kept
from heedful.core.errors import InactiveWarning, RefusedModel
from heedful.core.mask import Causal, Mask, Where
from heedful.core.method import Method, Stack
from heedful.core.positions import Pairs, Positions
from heedful.core.ragged import Ragged
from heedful.core.sites import Site, at
from heedful.engine.attend import attend
from heedful.engine.attention_call import AttentionCall
from heedful.engine.run_state import RunState
from heedful.engine.select import select
from heedful.methods.observe.sink_rate import SinkRate
from heedful.native import library
from heedful.tiny import tiny

from .samples import PAPER, notes_in

IDS = torch.arange(3, 27).view(2, 12)
SIZES = (3, 5)  # entries of llama's two key heads


def sizes(heads: int) -> Tensor:
    """What each head may see, `[1 heads 1]`."""
    return torch.tensor(SIZES).repeat_interleave(heads // len(SIZES))[None, :, None]


class Uneven(Method):
    """A cache of the last entries, more of them in one head than in the other."""

    paper = PAPER

    @at(Site.CACHE)
    def forget(self, entries: CachedKV, call: Call) -> Tensor:
        last = call.q_pos.amax((-2, -1), keepdim=True)
        return entries.is_filled & (last - entries.positions.position < sizes(call.kv_heads))


class Windows(Method):
    """What such a cache amounts to, as a mask: what was held when the call began, and the call's own tokens."""

    paper = PAPER

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        first = call.q_pos.amin((-2, -1), keepdim=True)[..., None]  # of text: padding stands before it
        if call.queries.is_filled is not None:
            first = call.q_pos.masked_fill(~call.queries.is_filled, 1 << 30).amin((-2, -1), keepdim=True)[..., None]
        held = sizes(call.heads)[..., None]
        return mask & Where(lambda q, k: k >= first - held)


def layer(length: int = 6) -> HeldLayer:
    held = HeldLayer()
    keys = torch.arange(2 * 2 * length * 3.0).view(2, 2, length, 3)
    held.update(keys, -keys[..., :2])
    return held


def uneven() -> tuple[HeldLayer, Tensor]:
    """Heads of 3, 6, 5 and 5 entries out of 6."""
    held, kept = layer(), torch.ones(2, 2, 6, dtype=torch.bool)
    kept[0, 0, :3] = False
    kept[1, :, 1] = False
    held.keep(Kept(kept))
    return held, kept


def read(held: HeldLayer, tokens: int) -> None:
    held.served = True
    held.update(torch.ones(2, 2, tokens, 3), torch.ones(2, 2, tokens, 2))


def entries(held: HeldLayer, row: int, head: int) -> tuple[list[int], list[list[float]]]:
    is_filled = held.is_filled[row, head]
    return held.index[row, head][is_filled].tolist(), held.keys[row, head][is_filled].tolist()


def test_uneven_heads_take_the_memory_of_their_entries() -> None:
    held, kept = uneven()
    total = 3 + 6 + 5 + 5
    assert held.counts == [3, 6, 5, 5]
    assert held._keys.plain.untyped_storage().nbytes() == total * 3 * 4
    assert held._values.plain.untyped_storage().nbytes() == total * 2 * 4
    cache = DynamicCache()
    cache.layers.append(held)
    assert cache_bytes(cache) == total * (3 + 2 + 1) * 4
    for row in range(2):
        for head in range(2):
            index, keys = entries(held, row, head)
            assert index == kept[row, head].nonzero().flatten().tolist()
            assert keys == layer().keys[row, head][kept[row, head]].tolist()
    assert torch.equal(held.values[held.is_filled], -held.keys[held.is_filled][:, :2])


def test_what_comes_later_stands_last_in_every_head() -> None:
    held, _ = uneven()
    new = torch.full((2, 2, 2, 3), 7.0)
    with pytest.raises(RefusedModel, match=r"unlike numbers of entries.*go on inside a run"):
        held.update(new, new[..., :2])
    held.served = True
    keys, values = held.update(new, new[..., :2])
    assert not held.served
    assert type(held.keys) is type(held.values) is torch.Tensor
    assert keys.shape == (2, 2, 8, 3)
    assert values.shape == (2, 2, 8, 2)
    assert torch.equal(keys[:, :, -2:], new)
    assert held.counts == [5, 8, 7, 7]
    assert entries(held, 0, 0)[0] == [3, 4, 5, 6, 7]
    positions = held.positions(torch.tensor([0, 2]))
    assert positions.is_filled is not None
    assert torch.equal(positions.is_filled.sum(-1).flatten(), torch.tensor(held.counts))
    assert positions.position[1, 0][positions.is_filled[1, 0]].tolist() == [-2, 0, 1, 2, 3, 4, 5]
    assert held.holds(keys, values)
    assert not held.holds(keys[:, :, 1:], values)


def test_even_heads_are_never_copied_to_be_looked_at() -> None:
    held = layer()
    for _ in range(2):
        keys, values = held.update(torch.ones(2, 2, 1, 3), torch.ones(2, 2, 1, 2))
        assert keys.data_ptr() == held._keys.plain.data_ptr() == held.keys.data_ptr()
        assert values.data_ptr() == held._values.plain.data_ptr() == held.values.data_ptr()
        kept = torch.ones(2, 2, keys.shape[2], dtype=torch.bool)
        kept[0, :, 0] = kept[1, :, 2] = False  # other entries in each text, as many in each
        held.keep(Kept(kept))
        assert held.positions(None).is_filled is None


def test_a_held_layer_crops_reorders_and_starts_anew() -> None:
    held, _ = uneven()
    assert held.get_seq_length() == 6
    assert held.get_mask_sizes(2) == (8, 0)
    before = held.keys.clone()
    held.reorder_cache(torch.tensor([1, 0]))
    assert held.counts == [5, 5, 3, 6]
    assert torch.equal(held.keys, before[[1, 0]])
    assert entries(held, 1, 0)[0] == [3, 4, 5]
    read(held, 3)
    held.crop(-2)
    assert held.get_seq_length() == 7
    assert entries(held, 1, 0) == ([3, 4, 5, 6], [*layer().keys[0, 0, 3:6].tolist(), [1.0] * 3])
    held.batch_repeat_interleave(2)
    assert held.counts == [6, 6, 6, 6, 4, 7, 4, 7]
    held.batch_select_indices(torch.tensor([3]))
    assert held.counts == [4, 7]
    assert entries(held, 0, 0)[0] == [3, 4, 5, 6]
    held.batch_select_indices(torch.tensor([True]))
    assert held.counts == [4, 7]
    with pytest.raises(ValueError, match="negative"):
        held.crop(2)
    held.reset()
    assert held.get_seq_length() == 0
    held.update(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3))
    assert held.index.shape == (1, 2, 3)
    assert held.whole


def test_tokens_that_were_there_when_entries_were_dropped_cannot_be_taken_back() -> None:
    held, _ = uneven()
    for taken in (0, -1):  # none: all of several guesses were right, but they were read at once
        with pytest.raises(RefusedModel, match="one after another"):
            held.crop(taken)
    read(held, 2)
    held.crop(-1)
    with pytest.raises(RefusedModel, match="take back"):
        held.crop(-2)
    read(held, 1)
    held.keep(Kept(held.is_filled & (held.index != 7)))
    held.crop(0)  # a token alone is no guess


def test_no_device_decides_a_step_late_where_that_cannot_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    held, _ = uneven()
    assert held.is_croppable, "whether the guesses can be is for crop() to say, in its own words"
    monkeypatch.setattr(held, "device", torch.device("mps"))
    assert not held.is_croppable
    read(held, 2)
    assert held.is_croppable


def test_a_whole_layer_stays_whole_when_cropped() -> None:
    held = layer()
    held.keep(Kept(held.is_filled))
    held.crop(-2)
    assert held.whole
    assert torch.equal(held.keys, layer().keys[:, :, :4])
    held.crop(-9)
    assert held.get_seq_length() == 0
    held.update(torch.ones(2, 2, 1, 3), torch.ones(2, 2, 1, 2))
    assert held.index.flatten().tolist() == [0] * 4


def test_what_is_held_cannot_be_written_over() -> None:
    held, _ = uneven()
    for name in ("keys", "values"):
        with pytest.raises(RefusedModel, match="cannot be written from outside"):
            setattr(held, name, torch.zeros(2, 2, 6, 3))
        setattr(held, name, None)
    assert held.counts == [3, 6, 5, 5]


class Counts(Method):
    """Notes how many calls it has seen with this cache."""

    paper = PAPER
    start: int = 0

    @at(Site.CACHE)
    def count(self, entries: CachedKV, call: Call) -> Tensor:
        before = call.state.cache.get("calls", torch.full((call.batch or 0,), self.start))
        call.state.cache["calls"] = before + 1
        return entries.is_filled


def test_another_stack_on_the_same_cache_begins_without_notes() -> None:
    model, cache = tiny("llama"), DynamicCache()
    for method, want in ((Counts(), 1), (Counts(), 2), (Counts(10), 11), (Counts(), 1)):
        with attach(model, SinkRate()) as run, torch.no_grad():
            run(input_ids=IDS[:, :2], **{CACHE: cache})  # whoever only reads leaves notes alone
        with pytest.warns(InactiveWarning), attach(model, method) as run, torch.no_grad():
            run(input_ids=IDS[:, :2], **{CACHE: cache})
        assert notes_in(cache)["calls"].tolist() == [want, want]


def test_a_head_that_keeps_nothing() -> None:
    held = layer()
    kept = torch.zeros(2, 2, 6, dtype=torch.bool)
    held.keep(Kept(kept))
    assert held.keys.shape == (2, 2, 0, 3)
    kept, held.served = torch.ones(2, 2, 2, dtype=torch.bool), True
    held.update(torch.ones(2, 2, 2, 3), torch.ones(2, 2, 2, 2))
    kept[0, 1] = False
    held.keep(Kept(kept))
    assert held.counts == [2, 0, 2, 2]
    held.served = True
    held.update(torch.ones(2, 2, 1, 3), torch.ones(2, 2, 1, 2))
    assert held.index[0, 1].tolist() == [0, 0, 8]


@pytest.mark.parametrize("beams", [1, 3])
def test_uneven_windows_in_a_model(beams: int) -> None:
    model, text = tiny("llama"), torch.ones_like(IDS)
    text[1, :5] = 0
    how: dict[str, Any] = dict(
        input_ids=IDS, attention_mask=text, max_new_tokens=6, num_beams=beams, do_sample=False, eos_token_id=None,
        pad_token_id=0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    with attach(model, Uneven()) as run:
        found = run.generate(**how)
        held, seen = run.activity().kept[0]
    with attach(model, Windows().when("decode")) as run:
        wanted = run.generate(**how)
    assert (held, seen) == (2 * beams * sum(SIZES), 2 * beams * (17 + 12))  # five tokens of one text are padding
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(close_model(a, b) for a, b in zip(found.scores, wanted.scores, strict=True))
    heads = model.config.num_key_value_heads
    one_entry = 2 * model.config.head_dim * 4 + 4
    assert heads == 2
    assert cache_bytes(found[CACHE]) == 2 * 2 * beams * sum(SIZES) * one_entry


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_uneven_windows_in_chunks(padded: bool) -> None:
    model, text = tiny("llama"), torch.ones_like(IDS)
    if padded:
        text[1, :3] = 0
    logits = []
    for method in (Uneven(), Windows()):
        cache, parts = DynamicCache(), []
        with attach(model, method) as run:
            for start in range(0, 12, 4):
                out = run(
                    input_ids=IDS[:, start : start + 4],
                    attention_mask=text[:, : start + 4],
                    position_ids=(text.cumsum(-1) - 1).clamp(min=0)[:, start : start + 4],
                    **{CACHE: cache},
                )
                parts.append(out.logits)
        logits.append(torch.cat(parts, 1)[text.bool()])
    assert close_model(*logits)


@torch.no_grad()
def test_nothing_is_padded_where_a_kernel_reads_heads_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache, made = tiny("llama"), DynamicCache(), []
    whole = Ragged.whole
    monkeypatch.setattr(Ragged, "whole", property(lambda x: made.append(tuple(x.shape)) or whole.fget(x)))  # type: ignore[attr-defined]
    with attach(model, Uneven()) as run:
        run(input_ids=IDS, **{CACHE: cache})
        assert not made
        run(input_ids=IDS[:, :1], **{CACHE: cache})
        assert cache.layers[0].counts == [*SIZES, *SIZES]
        assert all(len(shape) == 3 for shape in made) == (run.state.backends[0] == "native"), "places alone were padded"
        assert run.state.backends[0] != "sdpa"


@torch.no_grad()
def test_the_padded_copy_dies_with_the_call() -> None:
    model, cache = tiny("llama", head_dim=22), DynamicCache()
    with attach(model, Uneven()) as run:
        run(input_ids=IDS, **{CACHE: cache})
        run(input_ids=IDS[:, :1], **{CACHE: cache})
        assert cache.layers[0].counts == [*SIZES, *SIZES]
        gc.collect()
        alive = [x for x in gc.get_objects() if type(x) is Tensor and x.shape[-1:] == (22,)]
    padded = [x for x in alive if x.ndim == 4 and x.shape[2] > 1]
    assert not padded
    assert any(x.shape == (2 * sum(SIZES), 22) for x in alive), "the layers' own are found this way"


def table(rows: Tensor, keys: int) -> Tensor:
    """Ranges of columns as a table of pairs."""
    at = torch.arange(keys)
    return ((rows[..., :1] <= at) & (at < rows[..., 1:])).any(-2)


def test_what_several_steps_keep_is_what_all_of_them_keep() -> None:
    (held := layer()).keep(*(Kept(torch.arange(6).expand(2, 2, 6) != n) for n in (0, 1, 3)))
    assert held.index[0, 0].tolist() == [2, 4, 5]
    assert held.nbytes == held.keys.nbytes + held.values.nbytes + held.index.int().nbytes


@pytest.mark.parametrize("query", [3, 4, 5, 9])
def test_a_step_need_not_look_for_the_columns_it_sees(query: int) -> None:
    """A query newer than all keys sees each head's own; an older one, as after a crop, is looked at pair by pair."""
    held, _ = uneven()
    even = layer()
    even.keep(Kept(torch.arange(6).expand(2, 2, 6) > 1))
    for one in (held, even):
        keys, queries, mask = one.positions(None), Positions.row(query, 1), Mask((Causal(),))
        rows = mask.key_ranges(queries, keys, 4)
        found = mask.keeps(Pairs(queries, keys, 4, slice(0, 1), slice(0, len(keys))))
        wanted = one.index[:, :, None] <= query
        wanted = (wanted if keys.is_filled is None else wanted & keys.is_filled[:, :, None]).repeat_interleave(2, 1)
        found = torch.ones(1, 1, 1, len(keys), dtype=torch.bool) if found is None else found
        assert torch.equal(*torch.broadcast_tensors(found, wanted))
        assert bool(found.any())
        assert rows is not None
        assert torch.equal(*torch.broadcast_tensors(table(rows, len(keys)), wanted))


@pytest.mark.skipif(isinstance(library(), str), reason="the native kernel is not built")
@pytest.mark.parametrize("counts", [(40, 1300), (1300, 0), (513, 512)])
def test_native_skips_what_a_head_does_not_hold(counts: tuple[int, int]) -> None:
    held = HeldLayer()
    held.update(torch.randn(1, 2, 1300, 8), torch.randn(1, 2, 1300, 8))
    held.keep(Kept(torch.rand(1, 2, 1300).argsort(-1).argsort(-1) < torch.tensor(counts)[None, :, None]))
    q, run_state = torch.randn(1, 4, 1, 8), RunState(Stack((Uneven(),)))
    call = Call(0, 1, "bare", 4, 2, Positions.row(1300, 1), held.positions(None), 0.3, mask=Mask((Causal(),)))
    job = AttentionCall(run_state.plan(call), run_state, call)
    found = [
        attend(job, q, held.keys, held.values, lambda needs, name=name: select(name, needs))[0]
        for name in ("native", "reference")
    ]
    assert close(*found)
    assert bool(found[0][:, 2:].any()) == (counts[1] > 0), "a head that holds nothing gives nothing"


def test_bytes_of_any_cache() -> None:
    x = torch.ones(2, 2, 5, 3)
    cache = DynamicCache()
    cache.update(x, x, 0)
    assert cache_bytes(cache) == 2 * x.nbytes
    layer = cache.layers[0]
    layer.values = layer.keys
    assert cache_bytes(cache) == x.nbytes, "what is shared is held once"
    layer.values = torch.ones(1000)[:1]
    assert cache_bytes(cache) == x.nbytes + 4000, "a view holds all that it is a view of"
    layer.values = (
        (torch.ones(3, dtype=torch.int8), {"scale": torch.ones(2)}),
        [TwoTensor(torch.ones(4), torch.ones(4))],
    )
    assert cache_bytes(cache) == x.nbytes + 3 + 8 + 16 + 16
    other = DynamicCache()
    other.update(x, x, 0)
    assert cache_bytes(EncoderDecoderCache(other, cache)) == cache_bytes(cache) + cache_bytes(other)
    config = tiny("llama").config
    static = StaticCache(config=config, max_cache_len=16)
    assert cache_bytes(static) < 64, "counters alone"
    static.early_initialization(2, config.num_key_value_heads, config.head_dim, torch.float32, torch.device("cpu"))
    assert cache_bytes(static) >= 2 * 2 * 2 * config.num_key_value_heads * 16 * config.head_dim * 4
