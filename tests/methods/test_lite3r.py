"""Lite3R: both branches in loops over single tokens, the fit by normal equations of loops, and the first step."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, SiteError
from heedful.core.fitted import Fitted
from heedful.core.mask import Causal, Window
from heedful.methods import Lite3R
from heedful.methods.sparse.prefill.lite3r import _Lost, linear
from tests.by_hand import in_pieces, llama_states

N = 19
PADDED = torch.arange(N)[None] >= torch.tensor([[0], [5]])


def phi(x: Tensor) -> Tensor:
    return torch.stack([a + 1 if a > 0 else torch.exp(a) for a in x])


def of_query(q: Tensor, k: Tensor, v: Tensor, keep: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of a query and the keys that it sees: the sparse head, linear attention, and the whole head."""
    scores = k @ q / math.sqrt(len(q))
    count = max(1, int(keep * len(k)))
    best = sorted(range(len(k)), key=lambda j: -float(scores[j].detach()))[:count]
    like = torch.stack([phi(q) @ phi(one) for one in k])
    return scores[best].softmax(0) @ v[best], (like / like.sum()) @ v, scores.softmax(0) @ v


def params(d: int = 6) -> dict[str, Tensor]:
    return {"map": torch.randn(d, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)}


def by_hand(bare: Bare, weight: Tensor, keep: float, pads: tuple[int, int], causal: bool = True) -> Tensor:
    s = bare.shape
    out = torch.zeros(s.b, s.h, s.q, s.dv, dtype=torch.float64)
    for b, pad in enumerate(pads):
        for h in range(s.h):
            q, k, v = bare.q[b, h, pad:], bare.k[b, h // 2, pad:], bare.v[b, h // 2, pad:]
            for i in range(s.q - pad):
                end = i + 1 if causal else len(k)
                few, like, _ = of_query(q[i], k[:end], v[:end], keep)
                out[b, h, pad + i] = few + weight @ like
    return out


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("text", [None, PADDED], ids=["plain", "padded"])
def test_both_branches(backend: str, keep: float, text: Tensor | None) -> None:
    bare, pads = Bare(Shape(dv=6), dtype=torch.float64, text=text), (0, 0 if text is None else 5)
    rows = 7 if backend == "tiled" else None
    heads, _ = bare.run(Lite3R(keep), backend, rows, params())
    wanted = by_hand(bare, params()["map"], keep, pads)
    for b, pad in enumerate(pads):
        assert close(heads[b, :, pad:], wanted[b, :, pad:])


def test_where_all_see_all_and_the_first_steps_gradient() -> None:
    bare, given = Bare(Shape(dv=6), dtype=torch.float64, rules=()), params()
    leaves = [*given.values(), bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    heads = bare.run(Lite3R(0.4), "reference", params=given)[0]
    losses = [(x - 1).square().mean() for x in (heads, by_hand(bare, given["map"], 0.4, (0, 0), causal=False))]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_a_fit_finds_the_map_that_brings_heads_nearest() -> None:
    model = models.tiny("llama", dtype=torch.float64)
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) >= torch.tensor([[0], [4]])).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    found = fit(Lite3R(0.3), model, [{"input_ids": ids, "attention_mask": mask, "position_ids": places}] * 2)
    assert found.maps is not None
    assert found.share == 0.3
    d, depth = model.config.head_dim, model.config.num_hidden_layers
    gram, cross = torch.zeros(depth, d, d, dtype=torch.float64), torch.zeros(depth, d, d, dtype=torch.float64)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Any) -> Tensor:
        q, k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (turn(q), turn(k), v))
        out = torch.zeros_like(q)
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                few, like, whole = of_query(q[0, h, i], k[0, h, : i + 1], v[0, h, : i + 1], 0.3)
                gram[layer] += 2 * torch.outer(like, like)
                cross[layer] += 2 * torch.outer(like, whole - few)
                out[0, h, i] = whole
        return out

    with torch.no_grad():
        for text, pad in zip(ids, (0, 4), strict=True):
            llama_states(model, text[None, pad:], attend)
    for i in range(depth):
        more = gram[i].diagonal().mean() * torch.eye(d, dtype=torch.float64)
        wanted = (torch.linalg.inv(gram[i] + more) @ cross[i]).T
        assert wanted.abs().max() > 1e-3
        assert close_model(found.maps[f"map.{i}"], wanted.float())
        layer = Layer(i, 4, 2, d, d, 32)
        assert torch.equal(found.parameters(layer)["map"], found.maps[f"map.{i}"])


def test_a_text_in_pieces_is_the_text() -> None:
    model = models.tiny("llama")
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attach(model, Lite3R.example()) as run:
        assert close_model(in_pieces(run, ids, (5, 1, 1, 4, 1))[0], run(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_behind_a_window_a_text_in_pieces_is_the_text(kind: str) -> None:
    model = models.tiny(kind).eval()
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attach(model, Lite3R.example()) as run:
        assert close_model(in_pieces(run, ids, (5, 1, 1, 4, 1))[0], run(input_ids=ids).logits)


@pytest.mark.parametrize("chunk", [3, 64])
def test_sums_are_over_the_keys_that_a_narrower_mask_leaves(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heedful.methods.sparse.prefill.lite3r.CHUNK", chunk)
    bare = Bare(dtype=torch.float64, rules=(Causal(), Window(2)))
    found, s = linear(replace(bare.call, query=bare.q, key=bare.k, value=bare.v)), bare.shape
    for b, h, i in product(range(s.b), range(s.h), range(s.q)):
        place, g = s.k - s.q + i, h * s.g // s.h
        near = [place - 1, place] if place else [0]
        like = of_query(bare.q[b, h, i], bare.k[b, g, near], bare.v[b, g, near], 1.0)[1]
        assert close(found[b, h, i], like)


def test_how_maps_begin_and_that_they_learn_alone() -> None:
    layer = Layer(2, 4, 2, 8, 6, 32)
    found = Lite3R().parameters(layer)["map"]
    assert found.shape == (6, 6)
    assert 5e-4 < float(found.std()) < 2e-3
    assert torch.equal(found, Lite3R().parameters(layer)["map"])
    assert not torch.equal(found, Lite3R().parameters(Layer(3, 4, 2, 8, 6, 32))["map"])
    model = models.tiny("llama").requires_grad_(False)
    inputs = models.tiny_inputs(model)
    with attach(model, Lite3R(0.3)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in run.parameters())


def test_what_cannot_be() -> None:
    assert Lite3R() == Lite3R(0.3, 1e-3, None)
    assert Lite3R.neutral() == Lite3R(1.0, 0.0)
    assert Lite3R.example() == Lite3R(0.3, 0.5)
    for field, value in (("share", 0.0), ("share", 1.1), ("start", -0.1), ("start", math.inf)):
        with pytest.raises(FieldError, match=rf"Lite3R\.{field} = {value}"):
            Lite3R(**{field: value})
    with pytest.raises(FieldError, match=r"Lite3R\.batches = 0: must be 1 or more"):
        fit(Lite3R(), models.tiny("llama"), [])
    layer = Layer(1, 4, 2, 8, 6, 32)
    for maps in (Fitted({"map.0": torch.zeros(6, 6)}), Fitted({"map.1": torch.zeros(6, 5)})):
        with pytest.raises(FieldError, match=r"layer 1 wants a map of \[6, 6\]"):
            Lite3R(maps=maps).parameters(layer)
    with pytest.raises(SiteError, match="layer 0: queries, keys and values are known from MASK on"):
        linear(Bare().call)
    assert _Lost(0.3).share == 0.3
