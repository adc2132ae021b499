"""A tiny random model of plain torch, for laws: causal, over torch's own attention, which can be written out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

E, H, V = 32, 4, 128


class Logits(NamedTuple):
    """What it answers."""

    logits: Tensor


class _Attention(nn.Module):
    num_heads = H

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, E // H)).permute(2, 0, 3, 1, 4)
        heads: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(heads.transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(E), _Attention(), nn.Sequential(nn.Linear(E, E), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class TinyTorch(nn.Module):
    """A language model as people write them."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, E), nn.Linear(E, V)
        self.layers = nn.ModuleList(_Layer() for _ in range(layers))
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in self.named_parameters():
                of_norm = p.ndim == 1 and name.endswith("weight")
                p.normal_(float(of_norm), 0.3 if p.ndim > 1 else 0.1, generator=draw)

    def forward(self, input_ids: Tensor) -> Logits:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return Logits(self.head(x))


class WrittenOut(TorchFunctionMode):
    """torch's attention by its formula, as its documentation gives it: kernels round in other ways."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        scores = q @ k.mT * q.shape[-1] ** -0.5
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1) @ v
