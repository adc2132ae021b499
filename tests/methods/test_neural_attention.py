"""Neural attention against the authors' net, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.entry import Layer
from heedful.core.errors import ClashError, FieldError, SiteError
from heedful.methods import MultiTokenAttention, NeuralAttention
from tests.by_hand import heads_of, llama_states

SHAPES = {"q": (6, 8), "k": (6, 8), "1": (6, 12), "2": (3, 6), "3": (1, 3)}


def drawn() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    found = {f"weight_{name}": torch.randn(shape, generator=draw) / 2 for name, shape in SHAPES.items()}
    return found | {
        f"bias_{name}": torch.randn(shape[0], generator=draw) for name, shape in SHAPES.items() if name != "3"
    }


def net(q: Tensor, k: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """The score of one query and one key."""
    both = torch.cat([p["weight_q"] @ q + p["bias_q"], p["weight_k"] @ k + p["bias_k"]])
    first = torch.relu(p["weight_1"] @ both + p["bias_1"])
    return (p["weight_3"] @ torch.relu(p["weight_2"] @ first + p["bias_2"])).squeeze()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_the_net_in_every_backend(backend: str) -> None:
    text = torch.ones(2, 19, dtype=torch.bool)
    text[0, :4] = False
    bare, params = Bare(text=text, dtype=torch.float64), {name: x.double() for name, x in drawn().items()}
    heads, _ = bare.run(NeuralAttention(6), backend, params=params, tile_rows=7 if backend == "tiled" else None)
    spread = []
    for b in range(2):
        for h in range(4):
            for i in range(19):
                seen = [j for j in range(i + 1) if text[b, j]]
                if not seen:
                    assert not bool(heads[b, h, i].any())
                    continue
                scores = torch.stack([net(bare.q[b, h, i], bare.k[b, h // 2, j], params) for j in seen])
                spread.append(scores.std(correction=0))
                weights = scores.softmax(0)
                assert close(heads[b, h, i], sum(w * bare.v[b, h // 2, j] for w, j in zip(weights, seen, strict=True)))
    assert max(spread) > 1


@pytest.mark.parametrize("rows", [1, 19])
def test_a_bias_of_the_model_stays(rows: int) -> None:
    bare, params = Bare(), drawn()
    bias = torch.randn(2, 4, rows, 19, generator=torch.Generator().manual_seed(2))
    whole = replace(bare.call, query=bare.q, key=bare.k, bias=bias, params=params)
    call = whole.tile(slice(5, 9), slice(2, 11))
    found = NeuralAttention(6).score(torch.randn(2, 4, 4, 9), call)
    for b, h, i, j in [(0, 0, 0, 0), (1, 3, 3, 8), (0, 2, 1, 7), (1, 1, 2, 3)]:
        added = bias[b, h, i + 5 if rows > 1 else 0, j + 2]
        assert close(found[b, h, i, j], net(bare.q[b, h, i + 5], bare.k[b, h // 2, j + 2], params) + added)


def test_the_first_step_s_loss_and_gradient() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with attach(model, NeuralAttention(8)) as run:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        learned = {name: p for name, p in run.model.named_parameters() if "weight_" in name or "bias_" in name}
        found = {name: p.grad.clone() for name, p in learned.items()}
        mine = {name: p.detach().clone().requires_grad_() for name, p in learned.items()}
    assert len(mine) == 18

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotate: object) -> Tensor:
        q, k = rotate(q), rotate(k)  # type: ignore[operator]
        own = {name[name.index("weight_") if "weight_" in name else name.index("bias_") :]: p
               for name, p in mine.items() if f"layers.{layer}." in name}  # fmt: skip
        n, groups = q.shape[2], q.shape[1] // k.shape[1]
        heads = [(b, h) for b in range(len(q)) for h in range(q.shape[1])]
        pairs = [net(q[b, h, i], k[b, h // groups, j], own) for b, h in heads for i in range(n) for j in range(n)]
        scores = torch.stack(pairs).view(*q.shape[:3], n)
        hidden = torch.ones(n, n).tril() == 0
        return heads_of(scores.masked_fill(hidden, -torch.inf).softmax(-1), v)

    logits = model.lm_head(llama_states(model, ids, attend))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert close(loss, wanted)
    wanted.backward()
    for name, tensor in mine.items():
        assert tensor.grad is not None
        assert close(found[name], tensor.grad)
    assert all(bool(x.any()) for name, x in found.items() if "weight_1" in name)


def test_it_starts_as_linear_maps() -> None:
    found = NeuralAttention(6).parameters(Layer(3, 4, 2, 8, 6, 32))
    draw = torch.Generator().manual_seed(3)
    assert len(found) == 9
    for name, (rows, columns) in SHAPES.items():
        assert close(found[f"weight_{name}"], (2 * torch.rand(rows, columns, generator=draw) - 1) / math.sqrt(columns))
        if name != "3":
            assert close(found[f"bias_{name}"], (2 * torch.rand(rows, generator=draw) - 1) / math.sqrt(columns))
    odd = NeuralAttention(5).parameters(Layer(0, 4, 2, 8, 6, 32))
    assert odd["weight_2"].shape == (2, 5)
    assert NeuralAttention().width == 2


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"width = 1: must be 2 or more"):
        NeuralAttention(1)
    with pytest.raises(ClashError, match="it looks at rows of earlier calls"):
        NeuralAttention() | MultiTokenAttention()
    bare = Bare()
    for given in ({}, {"query": bare.q}, {"key": bare.k}):
        with pytest.raises(SiteError, match="layer 0: scores are those of a tile, from SCORES on"):
            NeuralAttention(6).score(torch.zeros(2, 4, 19, 19), replace(bare.call, params=drawn(), **given))
