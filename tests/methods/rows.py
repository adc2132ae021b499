"""What tests of whatever normalises scores share: heads held against one query's row, read from the paper in loops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Method
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from tests.by_hand import heads_of, llama_states

Row = Callable[[Tensor, Tensor], Tensor]  # a query [d] and the keys that it sees [n d] to what it gives each, [n]


def map_of(row: Row, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """All rows of a call without padding, `[b h n n]`."""
    b, h, n, _ = q.shape
    k = k.repeat_interleave(h // k.shape[1], 1)
    pad = torch.nn.functional.pad
    made = []
    for text, head in torch.cartesian_prod(torch.arange(b), torch.arange(h)).tolist():
        for t in range(n):
            seen = t + 1 if causal else n
            made.append(pad(row(q[text, head, t], k[text, head, :seen]), (0, n - seen)))
    return torch.stack(made).view(b, h, n, n)


def agrees(method: Method, row: Row, backend: str, looked: tuple[int, ...]) -> None:
    """Some rows of a call with padding before one of its texts, of all heads."""
    text = torch.ones(2, 19, dtype=torch.bool)
    text[0, :4] = False
    bare = Bare(text=text)
    heads, _ = bare.run(method, backend, tile_rows=7 if backend == "tiled" else None)
    for b in range(2):
        for t in looked:
            seen = [j for j in range(t + 1) if text[b, j]]
            for h in range(4):
                if not seen:
                    assert not bool(heads[b, h, t].any())
                    continue
                k, v = bare.k[b, h // 2, seen].double(), bare.v[b, h // 2, seen].double()
                assert close(heads[b, h, t], (row(bare.q[b, h, t].double(), k) @ v).float())


def agrees_where_all_is_seen(method: Method, row: Row) -> None:
    bare = Bare(rules=())
    heads, _ = bare.run(method, "reference")
    assert close(heads, heads_of(map_of(row, bare.q, bare.k, causal=False), bare.v))


def learns(method: Method, row: Row) -> None:
    """The first step's loss, and what the projections of a small llama are told by it."""
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    names = ("q_proj", "k_proj", "v_proj")

    def gradients(loss: Tensor) -> list[Tensor]:
        parts = [getattr(layer.self_attn, name).weight for layer in model.model.layers for name in names]
        return list(torch.autograd.grad(loss, parts))

    with attach(model, method) as run:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        got = gradients(loss)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: object) -> Tensor:
        return heads_of(map_of(row, rotate(q), rotate(k), causal=True), v)  # type: ignore[operator]

    logits = model.lm_head(llama_states(model, ids, attend))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert close(loss, wanted)
    for mine, theirs in zip(got, gradients(wanted), strict=True):
        assert bool(mine.any())
        assert close_model(mine, theirs)
