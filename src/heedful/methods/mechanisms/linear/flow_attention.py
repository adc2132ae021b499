"""Attention as a flow that is conserved: sources compete for what sinks let in, and sinks give out what they took."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Method, Paper, Site, at
from heedful.kit.running import Running, wide


class FlowAttention(Method):
    """Keys compete and queries allocate, both by conserved flows; linear in the tokens. For models trained with it."""

    paper = Paper(
        "P053",
        "Flowformer: Linearizing Transformers with Conservation Flows",
        "Haixu Wu, Jialong Wu, Jiehui Xu, Jianmin Wang, Mingsheng Long",
        2022,
        "2202.06258",
        "ICML 2022",
        differs=(
            "As in the authors' core code a source's flow is held to at most 1 before its exponential, to 5 in their "
            "code for language models, and flows of causal models are sums over the tokens so far; their small "
            "epsilons are left out, since sigmoids are above 0.",
            "Counts of tokens leave padding out.",
            "Flows need the queries of all earlier tokens: a causal text that was read into a cache without it begins, "
            "for it, where it goes on, and a cache that was cut back is refused.",
            "Key heads that are shared have flows of their own for each query head.",
            "Queries and keys come with the model's position embedding in them, where there is one.",
        ),
    )
    subjects = ("text", "image")

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        k, v = call.spread(k), call.spread(v)
        running = Running(call, k, own=True)
        text = call.is_text[..., None]
        q = torch.where(text, q.sigmoid(), 0.0)
        k, v = running.hide(running.cut(k).sigmoid()), running.cut(v)
        sinks = running.sums("sinks", text.to(q.dtype).expand(len(q), -1, -1, -1))
        sources = running.sums("sources", running.ones(k))
        let_in = _over(sources, _flow(q, running.sums("k", k)))
        let_out = _over(sinks, _flow(k, running.sums("q", q)))
        taken = _over(_flow(q, running.sums("k that compete", k * let_out)), sources)
        given = _over(_flow(k, running.sums("q that take", q * let_in)), sources).clamp(max=1)
        won = running.hide(given.exp())
        won = _over(won, running.sums("won", won)) * sources
        return running.mixed("flow", _over(q * let_in, sources), k, v * won) * taken.sigmoid()


def _flow(x: Tensor, total: Tensor) -> Tensor:
    """What goes through each of `x`, `[b h n 1]`."""
    return (x * total).sum(-1, keepdim=True)


def _over(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and x where y is 0, as in padding, where x is 0 too or comes to nothing."""
    return x / torch.where(y > 0, y, 1.0)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, FlowAttention()) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
