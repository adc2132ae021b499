"""MHE against its formula, head by head and token by token."""

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
from heedful.core.positions import Positions
from heedful.methods import MHE
from tests.by_hand import llama_states

PARTS = ("query", "key", "value")


def drawn() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    sizes = {"query": (4, 8), "key": (2, 8), "value": (2, 8)}
    return {name: torch.randn(size, generator=random) for name, size in sizes.items()}


def apart(by: str, one: Tensor, embedding: Tensor) -> Tensor:
    if by == "sum":
        return torch.stack([a + b for a, b in zip(one, embedding, strict=True)])
    return torch.stack([a * (b + 1) for a, b in zip(one, embedding, strict=True)])


@pytest.mark.parametrize("by", ["product", "sum"])
@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa"])
def test_the_formula_in_every_backend(by: str, backend: str) -> None:
    text = torch.ones(2, 19, dtype=torch.bool)
    text[0, :4] = False
    bare, p = Bare(text=text), drawn()
    heads, _ = bare.run(MHE(by), backend, params=p, tile_rows=7 if backend == "tiled" else None)
    for b in range(2):
        first = 4 if b == 0 else 0
        for h in range(4):
            for t in (first, 11, 18):
                q = apart(by, bare.q[b, 0, t], p["query"][h])
                keys = [apart(by, bare.k[b, 0, j], p["key"][h // 2]) for j in range(first, t + 1)]
                values = [apart(by, bare.v[b, 0, j], p["value"][h // 2]) for j in range(first, t + 1)]
                scores = torch.stack([q @ k * bare.call.scale for k in keys])
                assert close(heads[b, h, t], scores.softmax(0) @ torch.stack(values))


def test_without_embeddings_all_heads_are_one() -> None:
    bare = Bare()
    for by in ("product", "sum"):
        heads, _ = bare.run(MHE(by), "reference", params={name: 0 * x for name, x in drawn().items()})
        assert close(heads, heads[:, :1].expand_as(heads))


def test_what_it_starts_with() -> None:
    size = Layer(3, 4, 2, 8, 6, 32)
    found, random = MHE(spread=0.5).parameters(size), torch.Generator().manual_seed(3)
    assert {name: tuple(x.shape) for name, x in found.items()} == {"query": (4, 8), "key": (2, 8), "value": (2, 6)}
    for name in PARTS:
        assert close(found[name], torch.randn(found[name].shape, generator=random) / 2)
    assert close(MHE().parameters(size)["key"], found["key"] / 25)
    whole = replace(size, kv_heads=4, value_dim=8)
    assert sum(x.numel() for x in MHE().parameters(whole).values()) == 3 * 4 * 8  # the abstract's 3 n d


@pytest.mark.parametrize("by", ["product", "sum"])
def test_the_first_step_s_loss_and_gradient(by: str) -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with attach(model, MHE(by, spread=0.3)) as run:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        learned = {name: p for name, p in model.named_parameters() if "heedful" in name}
        rows = {part: getattr(model.model.layers[0].self_attn, f"{part[0]}_proj").weight.grad.clone() for part in PARTS}
    d = model.config.head_dim
    for found in rows.values():  # of the shared projections, which are the first head's
        assert bool(found[:d].any())
        assert not bool(found[d:].any())
    mine = {
        part: [p.detach().clone().requires_grad_() for name, p in learned.items() if name.endswith(part)]
        for part in PARTS
    }

    def told(x: Tensor, i: int, part: str) -> Tensor:
        embedding = mine[part][i][None, :, None]
        return x[:, :1] + (embedding if by == "sum" else x[:, :1] * embedding)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: object) -> Tensor:
        q, k = told(rotate(q), i, "query"), told(rotate(k), i, "key")  # type: ignore[operator]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, told(v, i, "value")))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(d)
        later = torch.ones(scores.shape[-2:]).triu(1).bool()
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ v

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
            if by == "sum" and part == "key":  # it shifts all scores of a query alike, which a softmax does not see
                assert float(got.abs().max()) < 1e-6
                continue
            assert bool(got.any())
            assert close(got, tensor.grad)


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"by = 'mean': must be 'product' or 'sum'"):
        MHE("mean")
    for spread in (-0.1, math.inf):
        with pytest.raises(FieldError, match=rf"spread = {spread}: must be 0 or more"):
            MHE(spread=spread)
    bare = Bare()
    index = torch.arange(19).expand(1, 2, 19)
    call = replace(bare.call, keys=Positions(index, index), params=drawn())
    for act in (MHE().offer, MHE().tell):
        with pytest.raises(SiteError, match="layer 0: heads share one key a token and hold unlike tokens"):
            act(bare.k, call)
