"""Weights exp(alpha q) exp(beta k), alpha and beta such that they spread as softmax's do, and softmax within blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Method, NonNegativeInt, Paper, Site, at
from heedful.kit.running import Running, divided, past_keys, wide
from heedful.kit.seen import softmax_over

SLOPE, SHIFT = (
    0.14855178144710912,
    -0.35487039130661086,
)  # log-variance of the weights by that of features; the authors'
TINY = 1e-9  # least variance of queries and keys


class LLNAttention(Method):
    """Linear attention with exponential features, as concentrated as softmax attention. For models trained with it."""

    paper = Paper(
        "P236",
        "Linear Log-Normal Attention with Unbiased Concentration",
        "Yury Nahshan, Joseph Kampeas, Emir Haleva",
        2024,
        "2311.13541",
        "ICLR 2024",
        differs=(
            "The spread of queries and keys is that of each text and key head, in causal models of its tokens so far; "
            "the authors take it over a whole batch and all heads, which would tell tokens of those that follow.",
            "Variances divide by how many entries there are, the authors' by one less.",
            "Blocks are counted from where a text begins, and are averaged with the features in equal parts; the "
            "authors' code has two ways to learn the parts too.",
            "Spreads need the queries of all earlier tokens: a causal text that was read into a cache without it "
            "begins, for it, where it goes on, and a cache that was cut back is refused.",
        ),
    )
    subjects = ("text", "image")
    block: NonNegativeInt | None = None  # tokens of a block of softmax attention; None: as a head is wide; 0: no blocks

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        running = Running(call, k, own=True)
        own, values = running.cut(k), running.cut(v)
        text = call.is_text.expand(len(q), k.shape[1], -1)[..., None]
        spread_q = _variance(running, "q", q.unflatten(1, (k.shape[1], -1)).transpose(2, 3).flatten(3), text)
        spread_k = _variance(running, "k", own, running.ones(own))
        wanted = (call.scale**2 * q.shape[-1] * spread_q * spread_k - SHIFT) / (2 * SLOPE)
        q_log, k_log = q * call.spread((wanted / spread_q).sqrt()), own * (wanted / spread_k).sqrt()
        top, fade = running.highest("top", k_log.amax(-1, keepdim=True))
        phi_q = (q_log - q_log.amax(-1, keepdim=True)).exp()
        values = torch.cat([values, running.ones(values)], -1)
        out = divided(running.mixed("products", phi_q, running.exp(k_log - top), values, fade))
        size = q.shape[-1] if self.block is None else self.block
        return (out + _in_blocks(q, k, v, call, size)) / 2 if size else out


@torch.no_grad()
def _variance(running: Running, name: str, x: Tensor, text: Tensor) -> Tensor:
    """Of the entries of `[b g n c]` at each token and all before it, `[b g n|1 1]`; at every token of all."""
    text = text.to(x.dtype)
    parts = torch.cat([x.mean(-1, keepdim=True), x.square().mean(-1, keepdim=True), torch.ones_like(text)], -1) * text
    mean, square, n = running.sums(name, parts).split(1, -1)
    n = n.clamp(min=1)
    return (square / n - (mean / n).square()).clamp(min=TINY)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, call: Call, size: int) -> Tensor:
    """Softmax attention to the tokens of the same block."""
    n, total, out = q.shape[2], k.shape[2], []
    past = past_keys(call, n, total) if call.mask.causal else 0
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        # of the block that begins before the first row, and of the one that ends after the last
        cols = slice(max(0, past + start - size + 1), min(total, past + start + 2 * size - 1))
        part = call.tile(rows, cols)
        near = (part.pairs.q // size) == (part.pairs.k // size)
        keep = part.mask.keeps(part.pairs)
        keep = near if keep is None else near & keep
        scores = q[:, :, rows] @ call.spread(k[:, :, cols]).mT * call.scale
        out.append(softmax_over(scores, keep) @ call.spread(v[:, :, cols]))
    return torch.cat(out, 2)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, LLNAttention()) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
