"""Weights 1 + s + s^2 / 2 over their sum, s = q k between -1 and 1: a polynomial that splits into features."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from heedful.authoring import Call, Method, Paper, Site, at
from heedful.kit.running import Running, divided, wide


class Fastmax(Method):
    """Softmax's exponential by its first terms, so that time grows with the tokens. For models trained with it."""

    paper = Paper(
        "P079",
        "FAST: Factorizable Attention for Speeding up Transformers",
        "Armin Gerami, Monte Hoover, Pranav S. Dulepet, Ramani Duraiswami",
        2024,
        "2402.07901",
        differs=(
            "Queries and keys are centred over their channels and divided by the longest of their text, as in one of "
            "the authors' torch files; another centres each channel over the text, which would tell of later tokens, "
            "and the wrapper of their kernels does not centre. The paper's text was not at hand.",
            "In causal models the longest is that so far, since that of all would tell tokens of those that follow.",
            "The longest query so far is needed: a causal text that was read into a cache without it begins, for it, "
            "where it goes on, and a cache that was cut back is refused.",
            "Products of two channels are made once and not twice, and no features are dropped in training.",
        ),
    )
    subjects = ("text", "image")
    order: Literal[1, 2] = 2  # terms of the series after the 1; the paper: 1 and 2

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        running = Running(call, k, own=True)
        k, v = running.cut(k), running.cut(v)
        q = (q - q.mean(-1, keepdim=True)) * call.is_text[..., None]
        k = k - k.mean(-1, keepdim=True)
        longest = running.peaks("q", _length(q)) * call.spread(running.peaks("k", _length(k)))
        q = q / torch.where(longest > 0, longest, 1.0)
        one, values = running.ones(k), torch.cat([v, running.ones(v)], -1)
        q, k = torch.cat([torch.ones_like(q[..., :1]), q], -1), torch.cat([one, k], -1)
        return divided(running.mixed("products", q, k, values, lift=_with_pairs if self.order == 2 else None))


def _length(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


def _with_pairs(x: Tensor) -> Tensor:
    """What comes to s^2 / 2 beside `[1 x]`: products of channels, each pair once."""
    i, j = torch.triu_indices(x.shape[-1] - 1, x.shape[-1] - 1, device=x.device)
    pairs = x[..., 1 + i] * x[..., 1 + j]
    return torch.cat([x, torch.where(i == j, pairs * 0.5**0.5, pairs)], -1)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, Fastmax()) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
