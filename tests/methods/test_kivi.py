"""KIVI against the paper's grouping, one number at a time, and step by step against its two lists of entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import CachedKV, Call
from heedful.core.errors import FieldError
from heedful.core.packed import Packing
from heedful.core.positions import Positions
from heedful.methods.sparse.cache.kivi import KIVI
from heedful.tiny import tiny


def rounded(numbers: list[float], bits: int) -> list[float]:
    """One group: the nearest of 2^bits even steps from its lowest to its highest."""
    low, high = min(numbers), max(numbers)
    steps = [low + (high - low) * i / (2**bits - 1) for i in range(2**bits)]
    return [min(steps, key=lambda s: abs(s - x)) for x in numbers]


def by_hand(key: Tensor, value: Tensor, method: KIVI) -> tuple[Tensor, Tensor]:
    """Keys and values `[n d]` of one head of one text, as they are held after it was read at once."""
    n, size = len(key), method.group
    key, value = key.clone(), value.clone()
    for start in range(0, n - n % method.residual, size):
        for j in range(key.shape[1]):
            key[start : start + size, j] = torch.tensor(rounded(key[start : start + size, j].tolist(), method.bits))
    for i in range(n - method.residual):
        for start in range(0, value.shape[1], size):
            part = value[i, start : start + size].tolist()
            value[i, start : start + size] = torch.tensor(rounded(part, method.bits))
    return key, value


def written(packing: object, given: Tensor) -> Tensor:
    assert isinstance(packing, Packing)
    return packing.over(given)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("group", "residual"), [(4, 4), (3, 3), (4, 8), (3, 12), (7, 14)])
def test_the_papers_groups(bits: int, group: int, residual: int) -> None:
    """The second text is padded; the last group of channels is shorter than the others."""
    method, n, pad = KIVI(bits, group, residual), 13, torch.tensor([0, 3])
    draw = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 2, n, 5, generator=draw), torch.randn(2, 2, n, 7, generator=draw)
    key[:, 0, :, 2] = 3.0  # a channel that never changes
    places = Positions.row(0, n, pad=pad)
    text = Positions(places.index, places.position, 0, None, places.position >= 0)
    left = method.quantise(CachedKV(key, value, places, n), Call(0, 1, "layer", 4, 2, text, places, 1.0))
    assert left.keep is None
    for b, start in enumerate(pad.tolist()):
        for g in range(2):
            want = by_hand(key[b, g, start:], value[b, g, start:], method)
            for found, given, wanted in zip((left.key, left.value), (key, value), want, strict=True):
                found = given if found is None else written(found, given)
                assert close(found[b, g, start:], wanted)
                assert torch.equal(found[b, g, :start], given[b, g, :start])
    assert (left.key is None) is (residual > n)
    assert (left.value is None) is (residual >= n)


def test_a_slot_that_holds_nothing_has_no_say() -> None:
    """A head of which another method dropped two entries; what stands in its empty slots is nobody's key."""
    draw, n = torch.Generator().manual_seed(1), 10
    key, place = torch.randn(1, 2, n, 4, generator=draw), torch.arange(n).repeat(1, 2, 1)
    key[0, 1, :2], place[0, 1] = 99.0, torch.tensor([0, 0, 1, 3, 4, 5, 6, 7, 8, 9])
    is_filled = torch.ones(1, 2, n, dtype=torch.bool)
    is_filled[0, 1, :2] = False
    row, places = Positions.row(0, n), Positions(place, place, is_filled=is_filled)
    found = KIVI(2, 4, 4).quantise(CachedKV(key, key, places, n), Call(0, 1, "layer", 4, 2, row, row, 1.0)).key
    found = written(found, key)
    for rows in ([2, 3], [4, 5, 6, 7]):  # positions 1 and 3, and 4 to 7
        for j in range(4):
            assert close(found[0, 1, rows, j], torch.tensor(rounded(key[0, 1, rows, j].tolist(), 2)))
    assert close(found[0, 0], by_hand(key[0, 0], key[0, 0], KIVI(2, 4, 4))[0])


@torch.no_grad()
def test_tokens_are_rounded_once_as_the_text_grows() -> None:
    """Of each length: keys in full blocks, values but the newest, each as it was when its turn came."""
    model, ids = tiny("llama", num_hidden_layers=1), torch.arange(3, 26)[None]
    method = KIVI(2, 4, 4)
    whole = model(input_ids=ids)[CACHE].layers[0]
    with attach(model, method) as run:
        cache, start = None, 0
        for stop in (7, 8, 9, 10, 11, 12, 18, 19, 23):
            cache = run(input_ids=ids[:, start:stop], **{CACHE: cache})[CACHE]
            start = stop
            for g in range(2):
                key, value = by_hand(whole.keys[0, g, :stop], whole.values[0, g, :stop], method)
                assert close_model(cache.layers[0].keys[0, g], key)
                assert close_model(cache.layers[0].values[0, g], value)


@torch.no_grad()
def test_what_follows_attends_to_rounded_entries() -> None:
    model, ids = tiny("llama", num_hidden_layers=1), torch.arange(3, 20)[None]
    plain = model(input_ids=ids)[CACHE]
    with attach(model, KIVI(4, 4, 4)) as run:
        out = run(input_ids=ids)
        assert close_model(out.logits, model(input_ids=ids).logits)
        plain.layers[0].keys, plain.layers[0].values = out[CACHE].layers[0].handed
        found = run(input_ids=ids[:, :1], **{CACHE: out[CACHE]}).logits
    assert close_model(found, model(input_ids=ids[:, :1], **{CACHE: plain}).logits)


def test_a_short_text_is_left_as_it_is() -> None:
    told = "the newest 32 tokens are whole, and the text has 31: a smaller residual would act"
    assert KIVI(residual=32).rests(31) == told
    assert KIVI(residual=32).rests(32) is None  # a whole block of keys


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits": 3}, r"KIVI\.bits = 3: must be 2, 4 or 8"),
        ({"group": 2}, r"KIVI\.group = 2: must be 3 or more"),
        ({"residual": 0}, r"KIVI\.residual"),
        ({"residual": 48}, r"KIVI\.residual = 48: must be a multiple of group.*128"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        KIVI(**settings)
