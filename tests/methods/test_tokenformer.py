"""TokenFormer against its formula, token by token and learned key by learned key."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, SiteError
from heedful.methods import SinkWindow, TokenFormer
from tests.by_hand import block_inputs, causal_map, heads_of, llama_states

PARTS = ("query", "key", "value")
SHAPE = Shape(q=7, k=7, dv=6)


def _looked_up(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One token `[e]`."""
    scores = [(key * x).sum() for key in keys]
    length = sum(s**2 for s in scores) ** 0.5
    out = torch.zeros_like(values[0])
    for s, value in zip(scores, values, strict=True):
        a = s * len(keys) ** 0.5 / length
        out = out + a * (1 + torch.erf(a / math.sqrt(2))) / 2 * value
    return out


def _drawn() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    p = {}
    for part, width in zip(PARTS, (32, 16, 12), strict=True):
        p[f"{part}_keys"] = torch.randn(5, 24, generator=draw).double()
        p[f"{part}_values"] = torch.randn(5, width, generator=draw).double()
    return p


@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa"])
def test_the_formula_in_every_backend(backend: str) -> None:
    bare, p = Bare(SHAPE, dtype=torch.float64), _drawn()
    heads, _ = bare.run(TokenFormer(5), backend, params=p, tile_rows=3 if backend == "tiled" else None)
    for b in range(2):
        q, k, v = ([_looked_up(x, p[f"{part}_keys"], p[f"{part}_values"]) for x in bare.hidden[b]] for part in PARTS)
        for h in range(4):
            mine, of_key, of_value = (slice(i * d, (i + 1) * d) for i, d in ((h, 8), (h // 2, 8), (h // 2, 6)))
            for t in range(7):
                scores = torch.stack([(q[t][mine] * k[j][of_key]).sum() * bare.call.scale for j in range(t + 1)])
                wanted = sum(w * v[j][of_value] for j, w in enumerate(scores.softmax(0)))
                assert close(heads[b, h, t], wanted)  # type: ignore[arg-type]


def test_what_it_starts_with() -> None:
    size = Layer(3, 4, 2, 8, 6, 40)
    found, random = TokenFormer(7, 0.5).parameters(size), torch.Generator().manual_seed(3)
    shapes = [(7, 40), (7, 32), (7, 40), (7, 16), (7, 40), (7, 12)]
    names = [f"{part}_{kind}" for part in PARTS for kind in ("keys", "values")]
    assert list(found) == names
    for name, shape in zip(names, shapes, strict=True):
        assert close(found[name], torch.randn(shape, generator=random) / 2)
    whole = TokenFormer().parameters(size)
    assert whole["key_values"].shape == (40, 16)
    assert 0.018 < float(whole["query_keys"].std()) < 0.022


def test_the_first_step_s_loss_and_gradient() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with attach(model, TokenFormer(6, 0.4)) as run:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        learned = {name: p for name, p in model.named_parameters() if "heedful" in name}
        own = [model.model.layers[0].self_attn.get_submodule(f"{x}_proj").weight.grad for x in "qkv"]
        assert not any(g is not None and bool(g.any()) for g in own)
    mine = {
        f"{part}_{kind}": [
            p.detach().clone().requires_grad_() for n, p in learned.items() if n.endswith(f"{part}_{kind}")
        ]
        for part in PARTS
        for kind in ("keys", "values")
    }

    def told(i: int, part: str, like: Tensor) -> Tensor:
        scores = inputs[i] @ mine[f"{part}_keys"][i].T
        a = scores * math.sqrt(6) / scores.square().sum(-1, keepdim=True).sqrt()
        out = a * (1 + torch.erf(a / math.sqrt(2))) / 2 @ mine[f"{part}_values"][i]
        return out.unflatten(-1, (like.shape[1], -1)).transpose(1, 2)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: object) -> Tensor:
        q, k = rotate(told(i, "query", q)), rotate(told(i, "key", k))  # type: ignore[operator]
        return heads_of(causal_map(q, k), told(i, "value", v))

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


@pytest.mark.parametrize("narrow", [None, SinkWindow(1, 5)])
def test_token_by_token_is_the_whole(narrow: SinkWindow | None) -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=12)["input_ids"]
    method = TokenFormer(6, 0.4)
    with attach(model, method if narrow is None else narrow | method) as run, torch.no_grad():
        whole, cache, parts = run(input_ids=ids).logits, None, []
        for start, stop in itertools.pairwise((0, 7, 8, 9, 12)):
            out = run(input_ids=ids[:, start:stop], use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            parts.append(out.logits)
    assert close_model(torch.cat(parts, 1), whole)


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"TokenFormer\.tokens = 0: must be 1 or more, or None"):
        TokenFormer(0)
    for spread in (0.0, math.inf):
        with pytest.raises(FieldError, match=rf"spread = {spread}: must be above 0"):
            TokenFormer(spread=spread)
    bare = Bare(SHAPE, dtype=torch.float64)
    for hidden in (None, bare.hidden[:, 1:]):
        call = replace(bare.call, hidden=hidden, params=_drawn())
        with pytest.raises(SiteError, match="layer 0: the layer's input"):
            TokenFormer(5).ask(bare.q, call)
    assert TokenFormer().idle(replace(bare.call, cross=True))
    assert not TokenFormer().idle(bare.call)


def test_tokens_that_were_read_without_it_keep_their_keys_and_values() -> None:
    whole, p = Bare(SHAPE, dtype=torch.float64), _drawn()
    bare = Bare(replace(SHAPE, q=2), dtype=torch.float64)
    call = replace(bare.call, params=p)
    for act, part, own in ((TokenFormer(5).offer, "key", whole.k), (TokenFormer(5).tell, "value", whole.v)):
        found = act(own, call)
        assert torch.equal(found[:, :, :5], own[:, :, :5])
        rows = [[_looked_up(x, p[f"{part}_keys"], p[f"{part}_values"]) for x in text] for text in bare.hidden]
        wanted = torch.stack([torch.stack(text) for text in rows]).unflatten(-1, (2, -1)).transpose(1, 2)
        assert close(found[:, :, 5:], wanted)
