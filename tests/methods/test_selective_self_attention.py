"""SSA against a reading of its formula in loops."""

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
from heedful.methods import SelectiveSelfAttention
from tests.by_hand import block_inputs, causal_map, heads_of, llama_states

SIZE = Layer(3, 4, 2, 8, 6, 32)


def drawn() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    return {
        "query": 0.3 * torch.randn(4, 24, generator=random),
        "value": 0.3 * torch.randn(2, 8, generator=random),
        "place": torch.tensor([-0.2]),
    }


@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa"])
def test_the_formula_in_every_backend(backend: str) -> None:
    text = torch.ones(2, 19, dtype=torch.bool)
    text[0, :4] = False
    bare, params = Bare(text=text), drawn()
    heads, _ = bare.run(SelectiveSelfAttention(), backend, params=params, tile_rows=7 if backend == "tiled" else None)
    strength = math.exp(-math.exp(-0.2))
    for b in range(2):
        for h in range(4):
            for t in (4, 5, 11, 18):
                first = 4 if b == 0 else 0
                heat = math.tanh(float(params["query"][h] @ bare.hidden[b, t])) + 1 + strength * math.log(t - first + 1)
                scores, values = [], []
                for j in range(first, t + 1):
                    scores.append(heat * (bare.q[b, h, t] @ bare.k[b, h // 2, j]) * bare.call.scale)
                    v = bare.v[b, h // 2, j]
                    values.append((1 + math.tanh(float(params["value"][h // 2] @ v))) * v)
                assert close(heads[b, h, t], torch.stack(scores).softmax(0) @ torch.stack(values))


def test_what_it_starts_with() -> None:
    found = SelectiveSelfAttention().parameters(SIZE)
    assert found["place"].tolist() == [1.5]
    assert found["query"].tolist() == [[0.0] * 32] * 4
    assert found["value"].tolist() == [[0.0] * 6] * 2
    random = torch.Generator().manual_seed(3)
    found = SelectiveSelfAttention(2.0, 0.5).parameters(SIZE)
    assert found["place"].tolist() == [2.0]
    assert close(found["query"], torch.randn(4, 32, generator=random) / 2)
    assert close(found["value"], torch.randn(2, 6, generator=random) / 2)


def test_the_first_step_s_loss_and_gradient() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with attach(model, SelectiveSelfAttention(start=0.5, spread=0.3)) as run:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        learned = {name: p for name, p in model.named_parameters() if "heedful" in name}
    mine: dict[str, list[Tensor]] = {
        part: [p.detach().clone().requires_grad_() for name, p in learned.items() if name.endswith(part)]
        for part in ("query", "value", "place")
    }

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: object) -> Tensor:
        q, k = rotate(q), rotate(k)  # type: ignore[operator]
        places = torch.arange(1, q.shape[2] + 1).log()
        token = torch.tanh(torch.einsum("bne,he->bhn", inputs[i], mine["query"][i]))
        heat = token + 1 + torch.exp(-torch.exp(mine["place"][i])) * places
        scale = 1 + torch.tanh(torch.einsum("bgnd,gd->bgn", v, mine["value"][i]))
        return heads_of(causal_map(heat[..., None] * q, k), scale[..., None] * v)

    with block_inputs(model) as inputs:
        logits = model.lm_head(llama_states(model, ids, attend))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert close(loss, wanted)
    wanted.backward()
    for part, tensors in mine.items():
        grads = [p.grad for name, p in learned.items() if name.endswith(part)]
        assert len(grads) == len(tensors) == len(model.model.layers)
        for got, tensor in zip(grads, tensors, strict=True):
            assert got is not None
            assert tensor.grad is not None
            assert bool(got.any())
            assert close(got, tensor.grad)


def test_errors() -> None:
    assert SelectiveSelfAttention.neutral() == SelectiveSelfAttention(10.0, 0.0)
    with pytest.raises(FieldError, match=r"start = inf: must be finite"):
        SelectiveSelfAttention(math.inf)
    for spread in (-0.1, math.inf):
        with pytest.raises(FieldError, match=rf"spread = {spread}: must be 0 or more"):
            SelectiveSelfAttention(spread=spread)
    bare = Bare()
    for hidden in (None, bare.hidden[:, 1:]):
        with pytest.raises(SiteError, match="layer 0: the layer's input"):
            SelectiveSelfAttention().heat(bare.q, replace(bare.call, hidden=hidden, params=drawn()))
