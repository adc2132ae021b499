"""Positional attention against its formula, pair by pair."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.methods import PositionalAttention
from tests.by_hand import heads_of, llama_states


def _place(number: int, width: int) -> Tensor:
    """Sines at falling rates, then cosines at the same."""
    half = math.ceil(width / 2)
    rates = [10000 ** (-i / half) for i in range(half)]
    both = [math.sin(number * r) for r in rates] + [math.cos(number * r) for r in rates]
    return torch.tensor(both[:width], dtype=torch.float64)


def _weights(p: dict[str, Tensor], h: int, i: int, seen: list[int]) -> Tensor:
    width = p["query"].shape[-1]
    q = p["query"][h] @ _place(i, width).to(p["query"])
    return torch.stack([q @ (p["key"][h] @ _place(j, width).to(q)) for j in seen]).softmax(0)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("width", [24, 7])
def test_only_places_tell_where_to_look(backend: str, width: int) -> None:
    text = torch.ones(2, 19, dtype=torch.bool)
    text[0, :4] = False
    bare, draw = Bare(text=text, dtype=torch.float64), torch.Generator().manual_seed(1)
    p = {name: torch.randn(4, 8, width, generator=draw, dtype=torch.float64) / 2 for name in ("query", "key")}
    found, _ = bare.run(PositionalAttention(), backend, params=p, tile_rows=7 if backend == "tiled" else None)
    for b in range(2):
        first = 4 if b == 0 else 0
        for h in range(4):
            for i in range(first, 19):
                weights = _weights(p, h, i - first, list(range(i - first + 1)))
                assert close(found[b, h, i], weights @ bare.v[b, h // 2, first : i + 1])


@pytest.mark.parametrize("rows", [1, 19])
def test_a_bias_of_the_model_stays(rows: int) -> None:
    bare = Bare()
    p = PositionalAttention().parameters(bare.shape.layer)
    bias = torch.randn(2, 4, rows, 19, generator=torch.Generator().manual_seed(2))
    call = replace(bare.call, bias=bias, params=p).tile(slice(5, 9), slice(2, 11))
    scores, bare_scores = torch.zeros(2, 4, 4, 9), replace(call, bias=None)
    plain = PositionalAttention().score(scores, bare_scores)
    wanted = plain + (bias if rows == 1 else bias[:, :, 5:9])[..., 2:11]
    assert close(PositionalAttention().score(scores, call), wanted)


def test_the_first_steps_loss_and_gradient() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with attach(model, PositionalAttention()) as run:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        learned = {n: p for n, p in run.model.named_parameters() if n.rpartition(".")[2].endswith(("query", "key"))}
        found = {name: p.grad.clone() for name, p in learned.items()}
        mine = {name: p.detach().clone().requires_grad_() for name, p in learned.items()}
    assert len(mine) == 4

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotate: object) -> Tensor:
        p = {n.rpartition("__")[2].rpartition(".")[2]: x for n, x in mine.items() if f"layers.{layer}." in n}
        p = {name[-5:] if name.endswith("query") else "key": x for name, x in p.items()}
        n = q.shape[2]
        rows = [[torch.nn.functional.pad(_weights(p, h, i, list(range(i + 1))), (0, n - i - 1)) for i in range(n)]
                for h in range(q.shape[1])]  # fmt: skip
        return heads_of(torch.stack([torch.stack(row) for row in rows])[None].expand(len(q), -1, -1, -1), v)

    logits = model.lm_head(llama_states(model, ids, attend))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert close(loss, wanted)
    wanted.backward()
    for name, x in mine.items():
        assert x.grad is not None
        assert bool(x.grad.any())
        assert close_model(found[name], x.grad)


def test_the_start() -> None:
    layer = Layer(3, 4, 2, 8, 8, 25)
    found, again = PositionalAttention().parameters(layer), PositionalAttention().parameters(layer)
    for name in ("query", "key"):
        assert found[name].shape == (4, 8, 25)
        assert torch.equal(found[name], again[name])
        assert 0.19 < float(found[name].max()) < 0.2
        assert -0.2 < float(found[name].min()) < -0.19
    assert not torch.equal(found["query"], found["key"])
    assert not torch.equal(found["key"], PositionalAttention().parameters(replace(layer, number=1))["key"])
