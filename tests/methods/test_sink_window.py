"""SinkWindow: what its cache holds, and that it is what its mask lets the next token see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close_model
from heedful.methods.sparse.cache.heavy_hitter import HeavyHitter
from heedful.methods.sparse.cache.razor_attention import RazorAttention
from heedful.methods.sparse.cache.snap_kv import SnapKV
from heedful.methods.sparse.prefill.sink_window import SinkWindow
from heedful.tiny import tiny

IDS = torch.arange(3, 43).view(2, 20)
METHOD = SinkWindow(sinks=2, window=4)


@torch.no_grad()
def read(text: Tensor, ids: Tensor, chunks: tuple[int, ...]) -> tuple[Any, list[list[int]]]:
    """The cache after these chunks, and the indices of text that it holds of each row."""
    model, cache, start = tiny("llama"), DynamicCache(), 0
    with attach(model, METHOD) as run:
        for stop in chunks:
            run(ids[:, start:stop], attention_mask=text[:, :stop].long(), **{CACHE: cache})
            start = stop
    layer = cache.layers[0]
    held = [layer.index[row, 0][layer.is_filled[row, 0]].tolist() for row in range(len(ids))]
    return cache, [[i for i in row if text[n, i]] for n, row in enumerate(held)]


@pytest.mark.parametrize("chunks", [(20,), (8, 20), (12, 20), (3, 4, 18, 20)])
def test_a_text_padded_on_the_right_keeps_its_own_end(chunks: tuple[int, ...]) -> None:
    text = torch.arange(20)[None] < torch.tensor([[20], [12]])
    cache, held = read(text, IDS, chunks)
    assert held == [[0, 1, 17, 18, 19], [0, 1, 9, 10, 11]]
    assert cache.layers[0].counts == [5, 5, 5, 5], "no padding is held"


def test_a_text_padded_on_the_left_keeps_the_same() -> None:
    text = torch.arange(20)[None] >= torch.tensor([[0], [8]])
    cache, held = read(text, IDS, (20,))
    assert held == [[0, 1, 17, 18, 19], [8, 9, 17, 18, 19]]
    assert cache.layers[0].counts == [5, 5, 5, 5], "no padding is held"


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [METHOD, SnapKV(6, window=2), HeavyHitter(6), RazorAttention(0.25, least=3, sinks=1, seed=0)]
)
def test_a_text_goes_on_after_padding_on_its_right_as_alone(method: Any) -> None:
    """Padding inside a text counts for nothing, however many steps follow."""
    model, text = tiny("llama"), torch.ones(2, 20, dtype=torch.long)
    text[1, 8:13] = 0
    positions = text.cumsum(-1) - 1
    bounds, logits, kept = (13, 16, 17, 18, 19, 20), [], []
    with attach(model, method) as run:
        past, start = None, 0
        for stop in bounds:
            given = {"attention_mask": text[:, :stop], "position_ids": positions[:, start:stop].clamp(min=0)}
            out = run(IDS[:, start:stop], **{CACHE: past}, use_cache=True, **given)
            past, start = out[CACHE], stop
            logits.append(out.logits[1:])
        kept.append(past.layers[0].counts[2:])
    alone = IDS[1:, text[1].bool()]
    with attach(model, method) as run:
        past, start, want = None, 0, []
        for stop in (8, *(x - 5 for x in bounds[1:])):
            out = run(alone[:, start:stop], **{CACHE: past}, use_cache=True)
            past, start = out[CACHE], stop
            want.append(out.logits)
        kept.append(past.layers[0].counts)
    assert kept[0] == kept[1]
    assert close_model(torch.cat(logits[1:], 1), torch.cat(want[1:], 1))


@torch.no_grad()
def test_a_step_after_the_cut_is_a_row_of_the_masked_prompt() -> None:
    with attach(tiny("llama"), METHOD) as run:
        whole = run(IDS, use_cache=False).logits
        cache = run(IDS[:, :17])[CACHE]
        steps = [run(IDS[:, i : i + 1], **{CACHE: cache}).logits for i in range(17, 20)]
    assert close_model(torch.cat(steps, 1), whole[:, 17:])
    assert cache.layers[0].keys.shape[2] == METHOD.declares(20)["kept"]


def _sees(query: int, key: int) -> bool:
    return key <= query and (query - key < 4 or key < 2)


@pytest.mark.parametrize("tokens", [1, 3, 5, 6, 20])
def test_what_it_declares(tokens: int) -> None:
    pairs = sum(_sees(q, k) for q in range(tokens) for k in range(tokens))
    kept = sum(_sees(tokens, k) for k in range(tokens))  # for the next token, which will see itself as well
    assert METHOD.declares(tokens) == {"density": pairs / tokens**2, "kept": kept}


def test_the_mask() -> None:
    call = Bare().call
    part = call.tile(slice(0, 19), slice(0, 19)).pairs
    found = METHOD.drop_the_middle(call.mask, call).keeps(part)
    assert found[0, 0].tolist() == [[_sees(q, k) for k in range(19)] for q in range(19)]


def test_a_short_text_is_left_whole_and_told_so() -> None:
    told = "there is room for 6 tokens, and the text has 6: window=3 would act"
    assert SinkWindow(2, 4).rests(6) == told
    assert SinkWindow(2, 4).rests(7) is None
