"""KNorm, and what every method with a budget has in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close_model
from heedful.core.call import CachedKV, Call
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.positions import Positions
from heedful.kit.budget import keep_best, newest, room, room_for
from heedful.methods.sparse.cache.heavy_hitter import HeavyHitter
from heedful.methods.sparse.cache.knorm import KNorm
from heedful.methods.sparse.cache.snap_kv import SnapKV
from heedful.tiny import tiny

METHODS = (KNorm(budget=5), HeavyHitter(budget=5), SnapKV(budget=5, window=2, kernel=3))
IDS = torch.arange(3, 35).view(2, 16)


def entries(key: Tensor, pad: Tensor | None = None) -> tuple[CachedKV, Call]:
    """A call that read as many tokens as there are keys."""
    n = key.shape[2]
    positions = Positions.row(0, n, pad=pad)
    return CachedKV(key, key, positions, n), Call(0, 1, "layer", key.shape[1], key.shape[1], positions, positions, 1.0)


def test_the_shortest_keys_stay() -> None:
    key = torch.randn(2, 3, 12, 4, generator=torch.Generator().manual_seed(0))
    kept = KNorm(budget=0.4).drop_long_keys(*entries(key))
    for b in range(2):
        for h in range(3):
            norms = [float((key[b, h, i] ** 2).sum()) for i in range(12)]
            assert kept[b, h].tolist() == [x in sorted(norms)[:5] for x in norms]


def test_padding_goes_first_and_takes_nobodys_room() -> None:
    key = torch.ones(2, 1, 8, 2)
    key[1, :, :3] = 0.0  # three padding tokens with the shortest keys of all
    kept = KNorm(budget=4).drop_long_keys(*entries(key, torch.tensor([0, 3])))
    assert kept.sum(-1).flatten().tolist() == [4, 4]
    assert not kept[1, :, :3].any()
    share = KNorm(budget=0.5).drop_long_keys(*entries(key, torch.tensor([0, 3])))
    assert share.sum(-1).flatten().tolist() == [4, 3], "half of 8 tokens and of 5"


@pytest.mark.parametrize("budget", [1, 7, 0.1, 0.25, 1.0])
def test_room(budget: Any) -> None:
    for tokens in (1, 10, 30, 31):
        _, call = entries(torch.zeros(1, 1, tokens, 1))
        assert int(room(budget, call)) == room_for(budget, tokens)
    assert room_for(0.1, 30) == 3
    assert room_for(0.1, 31) == 4


def test_the_best_and_the_newest() -> None:
    found, call = entries(torch.zeros(1, 2, 5, 1))
    score = torch.tensor([[[3.0, 1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]])
    kept = keep_best(score, found, torch.tensor([[[2], [3]]]))
    assert kept.int().tolist() == [[[1, 0, 1, 0, 0], [1, 1, 1, 0, 0]]]  # the older of equals
    assert newest(found, call, 2).flatten().tolist() == [False, False, False, True, True]


def test_padding_never_takes_the_room_of_an_entry_that_scores_minus_infinity() -> None:
    found, _ = entries(torch.zeros(1, 1, 4, 1), torch.tensor([2]))
    score = torch.tensor([[[5.0, 5.0, -torch.inf, -torch.inf]]])
    kept = keep_best(score, found, torch.tensor([[[1]]]))
    assert kept.flatten().tolist() == [False, False, True, False]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_the_budget_holds_while_decoding(method: Method) -> None:
    model, text = tiny("llama"), torch.ones_like(IDS)
    text[1, :13] = 0  # three tokens, fewer than the budget
    with attach(model, method) as run:
        out = run.generate(
            IDS, attention_mask=text, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True,
        )  # fmt: skip
        kept, seen = run.activity().kept[1]
    heads = model.config.num_key_value_heads
    assert out[CACHE].layers[1].counts == [5] * 2 * heads
    assert (kept, seen) == (2 * heads * 5, heads * (21 + 21 - 13)), "padding is nothing that could be kept"


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(method: Method) -> None:
    """A text decodes alike alone and padded beside another one."""
    model, text = tiny("llama"), torch.ones_like(IDS)
    text[1, :4] = 0
    logits = []
    for ids, mask in ((IDS, text), (IDS[1:, 4:], None)):
        with attach(model, method) as run:
            more = {} if mask is None else {"attention_mask": mask}
            out = run.generate(
                ids, **more, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        logits.append(torch.stack(out.logits, 1)[-1])
    assert close_model(*logits)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@torch.no_grad()
def test_beams_keep_what_is_theirs(method: Method) -> None:
    """After beams swapped rows, each goes on as it would have alone with its own tokens."""
    model = tiny("llama")
    swap = torch.tensor([1, 0])
    logits = []
    for swapped in (True, False):
        with attach(model, method) as run:
            out = run(input_ids=IDS if swapped else IDS[swap])
            cache = out[CACHE]
            if swapped:
                cache.reorder_cache(swap)
            logits += [torch.cat([run(input_ids=IDS[swap, i : i + 1], **{CACHE: cache}).logits for i in (4, 5, 6)])]
    assert close_model(*logits)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@torch.no_grad()
def test_a_new_text_starts_anew(method: Method) -> None:
    model, logits = tiny("llama"), []
    with attach(model, method) as run:
        for _ in range(2):
            cache = run(input_ids=IDS)[CACHE]
            logits.append(run(input_ids=IDS[:, :2], **{CACHE: cache}).logits)
            run(input_ids=IDS.flip(1)[:1])
    assert torch.equal(*logits)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@torch.no_grad()
def test_some_heads_only(method: Method) -> None:
    model = tiny("llama")
    size = model.config.num_attention_heads // model.config.num_key_value_heads
    with attach(model, method.on(heads=range(size))) as run:
        cache = run(input_ids=IDS)[CACHE]
        run(input_ids=IDS[:, :1], **{CACHE: cache})
    assert cache.layers[0].counts == [5, 17, 5, 17]


@pytest.mark.parametrize("kind", [KNorm, HeavyHitter, SnapKV])
@pytest.mark.parametrize("budget", [0, -3, 0.0, 1.5, True])
def test_budgets_that_are_none(kind: Any, budget: Any) -> None:
    with pytest.raises(FieldError, match=rf"{kind.__name__}\.budget"):
        kind(budget=budget)


def test_no_more_than_the_text_is_declared() -> None:
    assert KNorm(budget=70).declares(5) == {"kept": 5}
    assert KNorm(budget=70).declares(90) == {"kept": 70}
