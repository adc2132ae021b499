"""DuoAttention: heads of high gates keep everything, the others a few first tokens and a window."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import CachedKV
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.mask import First, Window
from heedful.core.positions import Positions
from heedful.methods.sparse.cache._fits import _best
from heedful.methods.sparse.cache.duo_attention import DuoAttention, _Gated
from tests.by_hand import Steps, Turn, causal_map, heads_of, llama_states

ONE = Fitted({"gates.0": torch.tensor([0.9, 0.1])})
N = 19


def _sees(q: int, k: int, head: int, pad: int = 0) -> bool:
    """Heads 0 and 1 belong to the key head of the high gate."""
    return pad <= k <= q and (head < 2 or q - k < 4 or k - pad < 2)


def test_the_mask_of_each_head() -> None:
    text = torch.ones(2, N, dtype=torch.bool)
    text[1, :5] = False
    call = Bare(text=text).call
    part = call.tile(slice(0, N), slice(0, N))
    kept = DuoAttention(0.5, 2, 4, ONE).narrow(call.mask, call).keeps(part.pairs)
    want = [[[[_sees(q, k, h, p) for k in range(N)] for q in range(N)] for h in range(4)] for p in (0, 5)]
    is_text = text[:, None, :, None]
    assert torch.equal(kept & is_text, torch.tensor(want) & is_text)


def test_the_cache_holds_what_the_next_token_may_see() -> None:
    call = Bare(Shape(b=1)).call
    entries = CachedKV(torch.randn(1, 2, N, 8), torch.randn(1, 2, N, 8), Positions.row(0, N), N)
    kept = DuoAttention(0.5, 2, 4, ONE).forget(entries, call)
    assert kept[0].tolist() == [[True] * N, [_sees(N, k, 2) for k in range(N)]]


def test_a_text_padded_on_the_right_keeps_its_own_end() -> None:
    text = torch.arange(N)[None] < torch.tensor([[N], [12]])
    entries = CachedKV(torch.randn(2, 2, N, 8), torch.randn(2, 2, N, 8), Positions.row(0, N), N)
    kept = DuoAttention(0.5, 2, 4, ONE).forget(entries, replace(Bare(text=text).call, depth=1))
    assert kept[:, 1].tolist() == [[_sees(n, k, 2) and k < n for k in range(N)] for n in (N, 12)]
    assert bool(kept[:, 0].all())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_padding_is_held(share: float) -> None:
    text = torch.arange(N)[None] >= torch.tensor([[0], [7]])
    call = Bare(text=text).call
    entries = CachedKV(torch.randn(2, 2, N, 8), torch.randn(2, 2, N, 8), call.keys, N)
    kept = DuoAttention(share, 2, 4, ONE).forget(entries, call)
    assert not kept[1, :, :7].any()
    assert kept.sum(-1).tolist() == ([[5, 5], [5, 5]] if share == 0 else [[N, N], [N - 7, N - 7]])


@pytest.mark.parametrize(("share", "want"), [(0.0, [0, 0, 0]), (0.5, [0, 2, 1]), (1.0, [2, 2, 2])])
def test_the_share_is_taken_over_all_layers(share: float, want: list[int]) -> None:
    rows = ([0.1, 0.2], [0.9, 0.8], [0.3, 0.2])
    found = _best(Fitted({f"gates.{i}": torch.tensor(row) for i, row in enumerate(rows)}), (("gates", share),))
    assert [int(x.sum()) for x in found] == want


def test_a_gate_mixes_two_softmaxes() -> None:
    bare = Bare()
    gate = torch.tensor([0.3, 0.8])
    method = _Gated(Window(4) | First(2))
    q, k, v = bare.q, bare.k.repeat_interleave(2, 1), bare.v.repeat_interleave(2, 1)
    scores = q @ k.mT / math.sqrt(8)

    def heads(sees: Any) -> Tensor:
        table = torch.tensor([[sees(i, j) for j in range(N)] for i in range(N)])
        return scores.masked_fill(~table, -torch.inf).softmax(-1) @ v

    full, near = heads(lambda i, j: j <= i), heads(lambda i, j: _sees(i, j, 3))
    by_head = gate.repeat_interleave(2)[None, :, None, None]
    want = by_head * full + (1 - by_head) * near
    for backend in ("reference", "tiled"):
        assert close(bare.run(method, backend, params={"gate": gate})[0], want)
    assert torch.equal(
        bare.run(method, "reference", params={"gate": torch.ones(2)})[0],
        bare.run(DuoAttention.neutral(), "reference")[0],
    )


def _gates(window: int, epochs: int) -> Tensor:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=16)["input_ids"]
    labels = ids.clone()
    labels[:, :-4] = -100
    method = DuoAttention(sinks=1, window=window, epochs=epochs, rate=0.1, penalty=1e-3)
    found = fit(method, model, [{"input_ids": ids, "labels": labels}])
    assert found.gates is not None
    assert not any(p.grad is not None for p in model.parameters())
    return torch.stack(list(found.gates.values()))


def test_a_fit_shuts_gates_that_nobody_needs_and_no_others() -> None:
    # where the window holds the text only the penalty speaks, and AdamW goes down by its rate
    assert close_model(_gates(window=16, epochs=3), torch.full((2, 2), 0.7))
    assert (_gates(window=2, epochs=6) > 0.75).all()


def test_steps_go_down_the_squared_distance_and_the_mean_of_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = models.tiny("llama"), Steps(monkeypatch)
    ids = models.tiny_inputs(model, length=12)["input_ids"]
    labels = ids.clone()
    labels[:, :-3] = labels[0, -1] = -100
    gates = [torch.full((2,), 0.8, requires_grad=True) for _ in range(2)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        gate = gates[layer].repeat_interleave(2)[:, None, None]
        full, near = causal_map(turn(q), turn(k)), causal_map(turn(q), turn(k), _near)
        return heads_of(gate * full + (1 - gate) * near, v)

    counted = [(0, 9), (0, 10), (1, 9), (1, 10), (1, 11)]
    own = model(input_ids=ids, output_hidden_states=True).hidden_states[-1].detach()
    states = llama_states(model, ids, attend)
    size = states.shape[-1]
    apart = sum((states[b, i, c] - own[b, i, c]) ** 2 for b, i in counted for c in range(size)) / (5 * size)
    wanted = torch.autograd.grad(apart, gates)
    method = DuoAttention(sinks=1, window=3, epochs=2, rate=0.2, penalty=1e-3)
    fit(method, model, [{"input_ids": ids, "labels": labels}])
    assert kept.settings == [{"lr": 0.2, "weight_decay": 0.0}]
    # at first all gates are open, nothing is lost and only the penalty's mean over four gates speaks
    assert close_model(1e3 * torch.cat(kept.grads[0]), torch.full((4,), 0.25))
    assert close_model(torch.cat(kept.before[1]), torch.full((4,), 0.8))
    assert close_model(1e3 * torch.cat(kept.grads[1]), 1e3 * torch.cat(wanted) + 0.25)


def _near(q: int, k: int) -> bool:
    return k <= q and (q - k < 3 or k < 1)


def test_tokens_that_do_not_count_do_not_matter() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=16)["input_ids"]
    found = []
    for last in (3, 5):
        changed = ids.clone()
        changed[:, -1] = last
        labels = ids.clone()
        labels[:, :-4] = labels[:, -1:] = -100
        found.append(fit(DuoAttention(sinks=1, window=2, epochs=3), model, [{"input_ids": changed, "labels": labels}]))
    assert found[0].gates == found[1].gates


def test_uneven_heads_stream_and_decode_alike() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=20)["input_ids"]
    gates = Fitted({"gates.0": torch.tensor([0.1, 0.9]), "gates.1": torch.tensor([0.2, 0.8])})
    with torch.no_grad(), attach(model, DuoAttention(0.5, 1, 4, gates)) as run:
        whole = run(input_ids=ids, use_cache=False).logits
        out = run(input_ids=ids[:, :-1], use_cache=True)
        last = run(input_ids=ids[:, -1:], **{CACHE: out[CACHE]}, use_cache=True).logits
        kept, seen = run.activity().kept[0]
    assert close_model(last, whole[:, -1:])
    assert (kept, seen) == (2 * (20 + 4), 2 * 2 * 20)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"share": 1.5}, r"DuoAttention\.share = 1\.5"),
        ({"sinks": -1}, r"DuoAttention\.sinks"),
        ({"window": 0}, r"DuoAttention\.window"),
        ({"rate": 0.0}, r"DuoAttention\.rate"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        DuoAttention(**settings)


def test_without_a_fit_or_labels_it_says_so() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with pytest.raises(FieldError, match=r"heedful\.fit\(\)"), attach(model, DuoAttention()) as run:
        run(input_ids=ids)
    with pytest.raises(FieldError, match="another model"), attach(model, DuoAttention(gates=ONE)) as run:
        run(input_ids=ids)
    with pytest.raises(FieldError, match="labels"):
        fit(DuoAttention(), model, [{"input_ids": ids}])


def test_a_short_text_is_left_whole_and_told_so() -> None:
    told = "there is room for 6 tokens, and the text has 6: smaller sinks or window would act"
    assert DuoAttention(sinks=2, window=4, seed=0).rests(6) == told
    assert DuoAttention(sinks=2, window=4, seed=0).rests(7) is None


def test_of_many_equal_heads_those_of_the_first_layers_are_whole() -> None:
    found = _best(Fitted({f"gates.{i}": torch.zeros(12) for i in range(3)}), (("gates", 0.25),))
    assert [int(row.sum()) for row in found] == [9, 0, 0]
    assert found[0].tolist() == [True] * 9 + [False] * 3
