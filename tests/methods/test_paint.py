"""PAINT: the last row's scores rise on the informative tokens of a marked span."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.positions import Positions
from heedful.methods.intervene.vision.paint import PAINT

N, SPAN = 16, (3, 14)


def _call(is_text: Tensor | None = None) -> Call:
    keep = torch.ones(N, N, dtype=torch.bool).tril()[None, None]
    keys = Positions.row(0, N)
    queries = Positions.row(0, N, is_filled=None if is_text is None else is_text[:, None])
    call = Call(0, 4, "layer", 4, 2, queries, keys, 1.0, roles={"marked": (SPAN,)}, keep=keep)
    return replace(call, rows=slice(0, N), cols=slice(0, N))


def _scores() -> Tensor:
    scores = torch.randn(2, 4, N, N, generator=torch.Generator().manual_seed(0))
    scores[..., 7] += 4  # an outlier
    return scores


def _by_loops(scores: Tensor, last: list[int], m: PAINT) -> Tensor:
    out = scores.clone()
    for b, i in enumerate(last):
        weights = scores[b, :, i, : i + 1].softmax(-1).sum(0)
        span = [j for j in range(*SPAN) if j <= i]
        given = weights[span].double().numpy()
        low, high = np.percentile(given, 25), np.percentile(given, 75)
        summary = [j for j, x in zip(span, given, strict=True) if x > high + 1.5 * (high - low)]
        ranked = sorted(span, key=lambda j: -float(weights[j]))[: int(np.ceil(len(span) * m.share))]
        for j in span:
            gain = m.beta if j in summary else m.alpha if j in ranked else 0.0
            out[b, :, i, j] = scores[b, :, i, j].abs() * gain + scores[b, :, i, j]
    return out


@pytest.mark.parametrize("method", [PAINT(), PAINT(alpha=1.5, beta=0.0, share=0.6), PAINT(alpha=0.0, beta=2.0)])
def test_the_formula(method: PAINT) -> None:
    is_text = torch.ones(2, N, dtype=torch.bool)
    is_text[1, -4:] = False
    call = _call(is_text)
    method.find_last(torch.empty(0), call)
    scores = _scores()
    found = method.raise_informed(scores, call)
    wanted = _by_loops(scores, [N - 1, N - 5], method)
    assert close(found, wanted)
    assert not close(found, scores)


def test_tiles_see_the_last_row_of_the_call() -> None:
    method, call, scores = PAINT(), _call(), _scores()
    method.find_last(torch.empty(0), call)
    whole = method.raise_informed(scores, call)
    for start, stop in ((0, 9), (9, N)):
        part = call.tile(slice(start, stop), slice(0, N))
        found = method.raise_informed(scores[:, :, start:stop], replace(part, keep=call.keep[:, :, start:stop]))
        assert torch.equal(found, whole[:, :, start:stop])


def test_gains_of_known_weights() -> None:
    given = torch.tensor([[0.9, 0.1, 0.11, 0.12, 0.13, 0.17, 0.0]])
    seen = torch.tensor([[False, True, True, True, True, True, False]])
    wanted = torch.tensor([[0, 0, 0, 0.7, 0.7, 0.3, 0]])
    assert torch.equal(PAINT(alpha=0.7, beta=0.3, share=0.5).gains(given, seen), wanted)
    assert not PAINT().gains(given, torch.zeros_like(seen)).any()


def test_each_added_token_is_a_last_row() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, batch=1, length=14)["input_ids"]
    with torch.no_grad(), attach(model, PAINT(share=1.0), roles={"marked": ((2, 9),)}) as run:
        out = run(input_ids=ids[:, :-1], use_cache=True)
        step = run(input_ids=ids[:, -1:], **{CACHE: out[CACHE]}).logits
        with run.paused():
            native = model(input_ids=ids).logits
    assert not close_model(step[:, -1], native[:, -1])
    assert close_model(out.logits[:, :-1], native[:, :-2])  # only the last row was edited


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side: str) -> None:
    model, method = models.tiny("llama"), PAINT(alpha=2.0, share=0.5)
    ids = models.tiny_inputs(model, batch=1, length=14)["input_ids"]
    pad = torch.zeros(1, 6, dtype=torch.long)
    parts, marks = [ids, pad], [torch.ones_like(ids), pad]
    if side == "left":
        parts, marks = parts[::-1], marks[::-1]
    padded, mask = torch.cat(parts, 1), torch.cat(marks, 1)
    with torch.no_grad(), attach(model, method, roles={"marked": ((2, 9),)}) as run:
        alone = run(input_ids=ids).logits
        found = run(input_ids=padded, attention_mask=mask).logits[mask.bool()][None]
    assert close_model(found, alone)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"alpha": -1.0}, r"PAINT\.alpha = -1\.0: must be 0 or more"),
        ({"beta": float("inf")}, r"PAINT\.beta"),
        ({"share": 1.5}, r"PAINT\.share"),
        ({"role": ""}, r"PAINT\.role"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        PAINT(**settings)


def test_a_weight_at_the_fence_is_no_summary() -> None:
    """Where all weights are alike the upper quartile and one and a half spreads above it are one of them."""
    even = torch.full((1, 4), 0.25)
    found = PAINT(alpha=0.7, beta=0.3, share=0.5).gains(even, torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(found, torch.tensor([[0.7, 0.7, 0.0, 0.0]]))


def test_it_is_idle_without_gains() -> None:
    for alpha, beta, idle in ((0.0, 0.0, True), (1.0, 1.0, False), (0.0, 0.5, False), (0.5, 0.0, False)):
        assert PAINT(alpha=alpha, beta=beta).idle(_call()) == idle
    assert PAINT().idle(replace(_call(), cross=True))
