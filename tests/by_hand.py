"""A llama written out, and what an optimiser was given: what fits are held against, apart from the package's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Method
from heedful.conformance.tolerances import close_model

Turn = Callable[[Tensor], Tensor]


def turning(model: Any, places: Tensor) -> Turn:
    """What turns a llama's queries and keys `[b h n d]` by their places `[b|1 n]`."""
    cos, sin = model.model.rotary_emb(model.model.embed_tokens.weight, places)
    half = cos.shape[-1] // 2
    return lambda y: y * cos[:, None] + torch.cat([-y[..., half:], y[..., :half]], -1) * sin[:, None]


def llama_states(model: Any, ids: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor, Turn], Tensor]) -> Tensor:
    """Final states, where `attend(layer, q, k, v, rotate)` makes `[b h n d]` of what the projections give."""
    base = model.model
    x = base.embed_tokens(ids)
    rotate, d = turning(model, torch.arange(ids.shape[1])[None]), model.config.head_dim
    for i, layer in enumerate(base.layers):
        part, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (p(y).unflatten(-1, (-1, d)).transpose(1, 2) for p in (part.q_proj, part.k_proj, part.v_proj))
        x = x + part.o_proj(attend(i, q, k, v, rotate).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return base.norm(x)


@contextmanager
def block_inputs(model: Any) -> Iterator[list[Tensor]]:
    """What the attention blocks of a llama are handed, `[b n e]` each, as its layers run meanwhile."""
    found: list[Tensor] = []
    norms = [layer.input_layernorm for layer in model.model.layers]
    hooks = [norm.register_forward_hook(lambda _, __, out: found.append(out)) for norm in norms]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def ending_in(model: Any, token: int = 7) -> list[dict[str, Tensor]]:
    """Two batches of texts whose last token is always the same, and alone is a label."""
    out = []
    for seed in range(2):
        ids = models.tiny_inputs(model, batch=4, length=6, seed=seed)["input_ids"]
        ids[:, -1] = token
        labels = torch.full_like(ids, -100)
        labels[:, -1] = token
        out.append({"input_ids": ids, "labels": labels})
    return out


def causal_map(q: Tensor, k: Tensor, seen: Callable[[int, int], bool] = lambda i, j: j <= i) -> Tensor:
    """softmax(q k / sqrt(d)) over the keys seen, with key heads shared by neighbours."""
    n = q.shape[2]
    table = torch.tensor([[seen(i, j) for j in range(n)] for i in range(n)])
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~table, -torch.inf).softmax(-1)


def heads_of(weights: Tensor, v: Tensor) -> Tensor:
    return weights @ v.repeat_interleave(weights.shape[1] // v.shape[1], 1)


class Steps:
    """What every step of an optimiser was given: gradients, rates, and the optimisers' settings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, optimiser: str = "AdamW") -> None:
        self.before: list[list[Tensor]] = []
        self.grads: list[list[Tensor]] = []
        self.rates: list[float] = []
        self.settings: list[dict[str, Any]] = []
        kept, kind = self, getattr(torch.optim, optimiser)

        class Kept(kind):  # type: ignore[misc, valid-type]
            def __init__(self, params: Any, **settings: Any) -> None:
                super().__init__(params, **settings)
                kept.settings.append(settings)

            def step(self, closure: Any = None) -> None:
                params = [p for group in self.param_groups for p in group["params"]]
                kept.before.append([p.detach().clone() for p in params])
                kept.grads.append([p.grad.detach().clone() for p in params])
                kept.rates.append(self.param_groups[0]["lr"])
                super().step()

        monkeypatch.setattr(torch.optim, optimiser, Kept)


def in_pieces(run: Any, ids: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Any]:
    """The logits of a text that comes in pieces, each going on from the last one's cache; and the cache."""
    cache, parts = None, []
    for piece in ids.split(sizes, 1):
        out = run(input_ids=piece, use_cache=True, **{CACHE: cache})
        cache = out[CACHE]
        parts.append(out.logits)
    return torch.cat(parts, 1), cache


def padding_counts_for_nothing(method: Method, side: str, **how: Any) -> None:
    """A text says in a small llama what it says with padding on one of its sides; `how` goes to `attach`."""
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, batch=1, length=14)["input_ids"]
    pad = torch.zeros(1, 6, dtype=torch.long)
    parts, marks = [ids, pad], [torch.ones_like(ids), pad]
    if side == "left":
        parts, marks = parts[::-1], marks[::-1]
    padded, mask = torch.cat(parts, 1), torch.cat(marks, 1)
    with torch.no_grad(), attach(model, method, **how) as run:
        alone = run(input_ids=ids).logits
        found = run(input_ids=padded, attention_mask=mask).logits[mask.bool()][None]
    assert close_model(found, alone)
