"""Threshold relative attention against the authors' formulas in loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, SiteError
from heedful.kit import rows
from heedful.methods import ThresholdRelativeAttention
from tests.by_hand import block_inputs, llama_states
from tests.methods.linear import PADDED, drawn


def params() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"weight": torch.randn(4, 24, generator=draw).double(), "bias": torch.randn(4, generator=draw).double()}


def unit(x: Tensor) -> Tensor:
    return x / ((x * x).sum() / len(x) + 1e-6).sqrt()


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, w: Tensor, c: Tensor, seen: list[list[int]], scale: float
) -> Tensor:
    """One head of one text: `seen` are the keys of each query, in their order."""
    rows = []
    for i, keys in enumerate(seen):
        scores = {j: (unit(q[i]) * unit(k[j])).sum() * scale for j in keys}
        left = [j for j in keys if scores[j].item() > 0]
        if not left:
            rows.append(torch.zeros_like(v[0]))
            continue
        decay = -torch.log(1 + torch.exp(-((w * x[i]).sum() + c)))
        logits = [scores[j] + decay * len([m for m in left if m >= j]) for j in left]
        total = sum(torch.exp(a) for a in logits)
        rows.append(sum(torch.exp(a) / total * v[j] for a, j in zip(logits, left, strict=True)))  # type: ignore[arg-type]
    return torch.stack(rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("at_once", [4, 19])
def test_the_formula(at_once: int, causal: bool, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE", 1)
    monkeypatch.setattr(rows, "LEAST", at_once)
    bare, call = drawn(causal, padded)
    own = params()
    call = replace(call, hidden=bare.hidden, params=own, scale=0.4)
    found = ThresholdRelativeAttention().attend((bare.q, bare.k, bare.v), call)
    blind = 0
    for b in range(2):
        text = PADDED[b].nonzero().flatten().tolist() if padded else list(range(19))
        seen = [[j for j in text if j <= i or not causal] for i in range(19)]
        for h in range(4):
            g = h // 2
            w, c = own["weight"][h], own["bias"][h]
            wanted = by_hand(bare.q[b, h], bare.k[b, g], bare.v[b, g], bare.hidden[b], w, c, seen, 0.4)
            blind += sum(not bool(wanted[i].any()) for i in text)
            assert close(found[b, h][text], wanted[text])
    assert (blind > 0) == causal  # some first tokens see no key above the threshold


def test_who_loses_interest_at_once_is_left_with_the_newest_key_above_the_threshold() -> None:
    bare, call = drawn(causal=False, padded=False)
    own = {"weight": torch.zeros(4, 24).double(), "bias": torch.full((4,), -2000.0).double()}
    found = ThresholdRelativeAttention().attend((bare.q, bare.k, bare.v), replace(call, hidden=bare.hidden, params=own))
    there = bare.q @ bare.k.repeat_interleave(2, 1).mT > 0
    newest = (there * torch.arange(1, 20)).argmax(-1)
    wanted = bare.v.repeat_interleave(2, 1).gather(2, newest[..., None].expand_as(found))
    assert close(found, wanted * there.any(-1, keepdim=True))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_a_hidden_key_holds_is_nobody_s_matter(bad: float) -> None:
    bare, call = drawn(causal=True, padded=True)
    call = replace(call, hidden=bare.hidden, params=params())
    method, key = ThresholdRelativeAttention(), bare.k.clone()
    key[~PADDED[:, None].expand(key.shape[:-1])] = bad
    assert close(method.attend((bare.q, key, bare.v), call), method.attend((bare.q, bare.k, bare.v), call))


def test_a_decode_step_sees_what_a_whole_text_sees() -> None:
    bare, call = drawn(causal=True, padded=False)
    call = replace(call, hidden=bare.hidden, params=params())
    method = ThresholdRelativeAttention()
    whole = method.attend((bare.q, bare.k, bare.v), call)
    last = replace(call, queries=call.queries.take(slice(18, 19)), hidden=bare.hidden[:, 18:], rows=slice(18, 19))
    assert close(method.attend((bare.q[:, :, 18:], bare.k, bare.v), last), whole[:, :, 18:])


def test_half_precision_is_computed_in_more_and_handed_back() -> None:
    bare, call = drawn(causal=True, padded=False)
    call = replace(call, hidden=bare.hidden.bfloat16(), params={n: x.float() for n, x in params().items()})
    q, k, v = bare.q.bfloat16(), bare.k.bfloat16(), bare.v.bfloat16()
    found = ThresholdRelativeAttention().attend((q, k, v), call)
    assert found.dtype == torch.bfloat16
    more = ThresholdRelativeAttention().attend((q.float(), k.float(), v.float()), call)
    assert torch.equal(found, more.bfloat16())


def test_the_first_step_s_loss_and_gradient() -> None:
    model = models.tiny("llama", dtype=torch.float64)
    ids = models.tiny_inputs(model)["input_ids"]
    with attach(model, ThresholdRelativeAttention()) as run:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        learned = run.parameters()
    theirs = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    mine = [p.detach().clone().requires_grad_() for p in learned]
    gates = {"weight": [p for p in mine if p.ndim == 2], "bias": [p for p in mine if p.ndim == 1]}

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, _: object) -> Tensor:
        n, groups = q.shape[2], q.shape[1] // k.shape[1]
        seen = [list(range(t + 1)) for t in range(n)]

        def one(b: int, h: int) -> Tensor:
            x, w, c = inputs[i][b], gates["weight"][i][h], gates["bias"][i][h]
            return by_hand(q[b, h], k[b, h // groups], v[b, h // groups], x, w, c, seen, q.shape[-1] ** -0.5)

        return torch.stack([torch.stack([one(b, h) for h in range(q.shape[1])]) for b in range(len(q))])

    with block_inputs(model) as inputs:
        logits = model.lm_head(llama_states(model, ids, attend))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    assert close(loss, wanted)
    wanted.backward()
    for got, tensor in zip(learned, mine, strict=True):
        assert bool(got.grad.any())
        assert close(got.grad, tensor.grad, 512)
    for got, parameter in zip(theirs, [p for p in model.parameters() if p.grad is not None], strict=True):
        assert close(got, parameter.grad, 512)


def test_it_starts_as_a_linear_map() -> None:
    found = ThresholdRelativeAttention().parameters(Layer(3, 4, 2, 8, 6, 32))
    draw = torch.Generator().manual_seed(3)
    assert close(found["weight"], (2 * torch.rand(4, 32, generator=draw) - 1) / math.sqrt(32))
    assert close(found["bias"], (2 * torch.rand(4, generator=draw) - 1) / math.sqrt(32))


def test_errors() -> None:
    for eps in (0, math.inf):
        with pytest.raises(FieldError, match=r"eps = .*: must be above 0"):
            ThresholdRelativeAttention(eps)
    bare = Bare()
    for hidden in (None, bare.hidden[:, 1:]):
        call = replace(bare.call, hidden=hidden, params=params())
        with pytest.raises(SiteError, match="layer 0: the layer's input"):
            ThresholdRelativeAttention().attend((bare.q, bare.k, bare.v), call)
