"""HeavyHitter against its definition, written out in loops over the patterns of a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods.sparse.cache.heavy_hitter import HeavyHitter
from heedful.native import library
from heedful.tiny import tiny
from tests.samples import notes_in

IDS = torch.arange(3, 35).view(2, 16)


def kept_by_hand(received: Tensor, held: list[int], most: int, recent: int) -> list[int]:
    """Of the indices that one head holds, those that stay, given what each index received so far."""
    new, old = held[len(held) - recent :] if recent else [], held[: len(held) - recent]
    ranked = sorted(old, key=lambda i: (-float(received[i]), i))
    return sorted(ranked[: most - recent] + new)


@pytest.mark.parametrize(("budget", "share"), [(6, 0.5), (5, 0.5), (6, 0.0), (6, 1.0), (0.5, 0.25)])
@torch.no_grad()
def test_what_received_most_stays(budget: float, share: float) -> None:
    """One layer, so that every pattern can be had from a model without a cut, masked by hand."""
    model = tiny("llama", num_hidden_layers=1)
    g = model.config.num_key_value_heads
    size = model.config.num_attention_heads // g
    method = HeavyHitter(budget, share)
    patterns = []
    with attach(model, method, backend="reference") as run:
        cache = None
        for chunk in (IDS[:, :9], IDS[:, 9:12], IDS[:, 12:13], IDS[:, 13:14]):
            out = run(input_ids=chunk, **{CACHE: cache}, output_attentions=True)
            cache = out[CACHE]
            layer = cache.layers[0]
            patterns.append((out.attentions[0], layer.index.clone(), layer.is_filled.clone()))
    for b in range(2):
        for head in range(g):
            received, held, seen = torch.zeros(16), [], 0
            for pattern, index, is_filled in patterns:
                fresh = pattern.shape[2]
                held += range(seen, seen + fresh)
                seen += fresh
                weights = pattern[b, head * size : (head + 1) * size].sum((0, 1))
                assert len(weights) == len(held)
                for i, weight in zip(held, weights.tolist(), strict=True):
                    received[i] += weight
                most = budget if isinstance(budget, int) else -(-seen * budget // 1)
                if len(held) > most:
                    held = kept_by_hand(received, held, int(most), int(share * most))
                assert index[b, head][is_filled[b, head]].tolist() == held


@torch.no_grad()
def test_every_backend_weighs_alike_after_a_cut() -> None:
    model, text = tiny("llama"), torch.ones_like(IDS)
    text[1, :5] = 0
    votes = []
    for backend in ("reference", "tiled", *([] if isinstance(library(), str) else ["native"])):
        with attach(model, HeavyHitter(5), backend=backend) as run:
            cache = None
            for stop in (12, 15, 16):
                start = 0 if cache is None else cache.get_seq_length()
                positions = (text.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
                inputs = dict(input_ids=IDS[:, start:stop], attention_mask=text[:, :stop], position_ids=positions)
                cache = run(**inputs, **{CACHE: cache})[CACHE]
        votes.append(notes_in(cache, 1)["received"])
    assert all(close_model(x, votes[0]) for x in votes)


@pytest.mark.filterwarnings("ignore:this run changed nothing")
@torch.no_grad()
def test_a_token_inherits_nothing_from_one_that_was_cropped() -> None:
    model = tiny("llama", num_hidden_layers=1)
    with attach(model, HeavyHitter(12), backend="reference") as run:
        cache = run(input_ids=IDS[:, :10])[CACHE]
        cache.crop(-4)
        out = run(input_ids=IDS[:, 10:12], **{CACHE: cache}, output_attentions=True)
    weights = out.attentions[0].sum(2).unflatten(1, (model.config.num_key_value_heads, -1)).sum(2)
    assert torch.equal(notes_in(cache)["received"][..., 6:], weights[..., 6:])
    assert not torch.equal(notes_in(cache)["received"][..., :6], weights[..., :6])


@pytest.mark.parametrize("recent", [-0.1, 1.1])
def test_wrong_fields_are_refused(recent: float) -> None:
    with pytest.raises(FieldError, match=r"HeavyHitter\.recent"):
        HeavyHitter(recent=recent)


def test_no_more_than_the_text_is_declared() -> None:
    assert HeavyHitter(budget=70).declares(5) == {"kept": 5}
    assert HeavyHitter(budget=70).declares(90) == {"kept": 70}
