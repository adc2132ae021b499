"""VHR: heads that a marked span matters to are found from the prompt's last token, and scaled up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call, Phase
from heedful.core.errors import FieldError
from heedful.core.mask import Causal, Mask, Padding
from heedful.core.positions import Positions
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.methods.intervene.vision.vhr import VHR

N, SPAN = 9, (2, 5)
SCALE = 0.7


def _call(text: Tensor, heads: int = 4) -> Call:
    """A call with random tensors over the given text `[b n]`, False for padding."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(len(text), g, N, 6, generator=draw) for g in (heads, heads // 2, heads // 2))
    pad = text.long().cummax(-1).values.logical_not().sum(-1)
    queries = Positions.row(0, N, pad=pad, is_filled=text[:, None])
    return Call(
        0, 1, "bare", heads, heads // 2, queries, Positions.row(0, N, pad=pad), SCALE, roles={"marked": (SPAN,)},
        mask=Mask((Causal(), Padding(text))), query=2 * q, key=k, value=v,
    )  # fmt: skip


def _by_loops(call: Call, text: Tensor, without: bool) -> Tensor:
    """Attention of each text's last token, one head and one key at a time."""
    q, k, v = call.query, call.key, call.value
    out = torch.zeros(len(text), 4, v.shape[-1])
    for b in range(len(text)):
        last, first = max(i for i in range(N) if text[b, i]), min(i for i in range(N) if text[b, i])
        keys = [j for j in range(first, last + 1) if text[b, j]]
        if without:
            keys = [j for j in keys if not SPAN[0] <= j - first < SPAN[1]]
        for h in range(4):
            scores = torch.stack([q[b, h, last] @ k[b, h // 2, j] * SCALE for j in keys])
            weights = (scores if call.softcap is None else call.softcap * (scores / call.softcap).tanh()).softmax(0)
            out[b, h] = sum(w * v[b, h // 2, j] for w, j in zip(weights, keys, strict=True))
    return out


TEXT = torch.ones(3, N, dtype=torch.bool)
TEXT[1, :2] = False
TEXT[2, -2:] = False


def test_heads_with_and_without_the_span() -> None:
    call = _call(TEXT)
    found = VHR().last_heads(call)
    for x, without in zip(found, (False, True), strict=True):
        assert close(x, _by_loops(call, TEXT, without))
    assert not close(*found)


def test_a_soft_cap_counts() -> None:
    call = _call(TEXT)
    capped = replace(call, softcap=2.0)
    for x, without in zip(VHR().last_heads(capped), (False, True), strict=True):
        assert close(x, _by_loops(capped, TEXT, without))
    assert not close(VHR().last_heads(capped)[0], VHR().last_heads(call)[0])


class _Given(VHR):
    """Heads as a test wants them."""

    paper = VHR.paper
    pair: Any = None

    def last_heads(self, call: Call) -> tuple[Tensor, Tensor]:
        return self.pair


def test_half_of_the_heads_is_chosen_and_surges_are_not() -> None:
    # divergences 1, 5, 2, 9; the last head's own output without the span is far the largest
    with_span = torch.tensor([[[1.0, 0], [5, 0], [2, 0], [1, 0]]])
    quiet, surge = torch.zeros_like(with_span), torch.zeros_like(with_span)
    loud = with_span.clone()
    loud[0, 3, 0] = 9.0
    assert _Given(pair=(loud, quiet)).choose(None).tolist() == [[False, True, False, True]]
    surge[0, 3, 0] = 10.0
    assert _Given(pair=(with_span, surge)).choose(None).tolist() == [[False, True, True, False]]


def _chosen_by_loops(one: Tensor, other: Tensor) -> list[bool]:
    """The heads of one text `[h d]` as the paper's formulas read: sqrt of summed squares, outliers, the median."""
    h = len(one)

    def above(x: list[float]) -> list[bool]:
        mean = sum(x) / h
        spread = (sum((y - mean) ** 2 for y in x) / h) ** 0.5
        return [y > mean + spread for y in x]

    far = [
        sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True)) ** 0.5
        for x, y in zip(one, other, strict=True)
    ]
    surge = [sum(b * b for b in y.tolist()) for y in other]
    kept = [0.0 if a and b else x for x, a, b in zip(far, above(far), above(surge), strict=True)]
    return [x > sorted(kept)[(h - 1) // 2] for x in kept]


def test_divergence_is_the_norm_of_the_difference() -> None:
    one = torch.tensor([[[3.0, 0], [2, 2], [0, 3], [2.9, 0], [5, 0], [0, 0]]])
    other = torch.tensor([[[0.0, 0], [0, 0], [3, 0], [0, 0], [5, 1], [1, 0]]])
    # |one - other|: 3, 2.83, 4.24, 2.9, 1, 1; as L1: 3, 4, 6, 2.9, 1, 1; |one| - |other|: 3, 2.83, 0, 2.9, 0.1, 1
    assert _Given(pair=(one, other)).choose(None).tolist() == [[True, False, True, True, False, False]]
    assert _chosen_by_loops(one[0], other[0]) == [True, False, True, True, False, False]


@pytest.mark.parametrize("size", [1.0, 0.1])
def test_the_choice_is_the_papers_head_by_head(size: float) -> None:
    draw = torch.Generator().manual_seed(4)
    one, other = (size * torch.randn(60, 9, 3, generator=draw) for _ in range(2))
    other[:, 0] *= 4  # a surge without the span
    found = _Given(pair=(one, other)).choose(None)
    assert found.tolist() == [_chosen_by_loops(x, y) for x, y in zip(one, other, strict=True)]
    assert not found[:, 0].all()


def test_chosen_heads_are_scaled_and_kept_while_decoding() -> None:
    call, heads = _call(TEXT), torch.randn(3, 4, N, 6)
    method = VHR(alpha=3.0)
    chosen = method.choose(call)
    assert chosen.any(-1).all()
    assert not chosen.all(-1).any()
    found = method.reinforce(heads, call)
    for b in range(3):
        for h in range(4):
            assert torch.equal(found[b, h], heads[b, h] * (3.0 if chosen[b, h] else 1.0))
    step = replace(call, phase=Phase.DECODE, query=call.query.flip(1), key=call.key.flip(1))
    assert not torch.equal(method.choose(step), chosen)
    assert torch.equal(method.reinforce(heads, step), found)
    assert not torch.equal(method.reinforce(heads, replace(step, phase=Phase.PREFILL)), found)


class _Heads(VHR):
    """Reads a layer's heads beside what the method computes for their last token."""

    paper = VHR.paper

    @reads(Site.HEAD_OUTPUT)
    def reinforce(self, heads: Tensor, call: Call) -> Cat:  # type: ignore[override]
        return Cat({f"{call.layer} model": heads[:, :, -1].detach(), f"{call.layer} mine": self.last_heads(call)[0]})


def test_what_it_computes_is_what_the_model_does() -> None:
    model = models.tiny("llama")
    with torch.no_grad(), attach(model, _Heads(), roles={"marked": (SPAN,)}) as run:
        run(**models.tiny_inputs(model, length=12))
        for cat in run[_Heads()].values():
            model_heads, mine = (
                next(x for name, x in cat.pieces.items() if name.endswith(w)) for w in ("model", "mine")
            )
            assert close(mine, model_heads)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side: str) -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, batch=1, length=14)["input_ids"]
    pad = torch.zeros(1, 6, dtype=torch.long)
    parts, marks = [ids, pad], [torch.ones_like(ids), pad]
    if side == "left":
        parts, marks = parts[::-1], marks[::-1]
    padded, mask = torch.cat(parts, 1), torch.cat(marks, 1)
    with torch.no_grad(), attach(model, VHR(), roles={"marked": (SPAN,)}) as run:
        alone = run(input_ids=ids).logits
        found = run(input_ids=padded, attention_mask=mask).logits[mask.bool()][None]
    assert close_model(found, alone)


def test_without_the_span_in_the_text_nothing_happens() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    roles = {"marked": ((500, 510),)}
    with torch.no_grad(), pytest.warns(match="changed nothing"), attach(model, VHR(), roles=roles) as run:
        assert close_model(run(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"alpha": -1.0}, r"VHR\.alpha = -1\.0: must be 0 or more"), ({"role": ""}, r"VHR\.role")],
)
def test_wrong_fields_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        VHR(**settings)
