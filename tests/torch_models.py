"""Plain torch models, as people write them, and torch's attention written out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

E, H = 32, 4


class Attention(nn.Module):
    """Self- or cross-attention over torch's function; what that is told stands in `how`."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.num_heads, self.how = H, how
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.kernel: Callable[..., Tensor] = F.scaled_dot_product_attention

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        b, n, _ = x.shape
        q = self.qkv(x)[..., :E].view(b, n, H, -1).transpose(1, 2)
        k, v = self.qkv(source)[..., E:].view(b, source.shape[1], 2, H, -1).permute(2, 0, 3, 1, 4)
        heads = self.kernel(query=q, key=k, value=v, **self.how)
        return self.proj(heads.transpose(1, 2).reshape(b, n, E))


class Listed(Attention):
    """Its projection stands in a list, as diffusers has it, or is called `out`."""

    def __init__(self, in_list: bool) -> None:
        super().__init__()
        held = self._modules.pop("proj")
        self.to_out = nn.ModuleList([held, nn.Dropout(0.0)]) if in_list else None  # type: ignore[list-item]
        self.out = None if in_list else held

    @property
    def projection(self) -> nn.Linear:
        return self.out if self.to_out is None else self.to_out[0]  # type: ignore[return-value]

    def proj(self, heads: Tensor) -> Tensor:  # type: ignore[override]
        found: Tensor = self.projection(heads)
        return found


class Block(nn.Module):
    def __init__(self, cross: bool = False, **how: Any) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(E), Attention(**how)
        self.cross = Attention() if cross else None
        self.mlp = nn.Sequential(nn.Linear(E, E), nn.GELU(), nn.Linear(E, E))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm(x))
        if self.cross is not None:
            x = x + self.cross(x, context)
        return x + self.mlp(x)


class Plain(nn.Module):
    """Two blocks; with `again`, each under gradient checkpointing."""

    def __init__(self, cross: bool = False, again: bool | None = None, **how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(cross, **how) for _ in range(2))
        self.again = again
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, 0.0, 0.3)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            if self.again is None:
                x = block(x, context)
            else:
                x = checkpoint(block, x, context, use_reentrant=self.again)
        return x


def tokens(n: int = 10, seed: int = 0, b: int = 2) -> Tensor:
    return torch.randn(b, n, E, generator=torch.Generator().manual_seed(seed))


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    edit: Callable[[Tensor], Tensor] = lambda p: p,
) -> Tensor:
    """What torch's documentation says that its function computes, with an edit of the weights."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if is_causal:
        keep = keep.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        keep = keep & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
    return edit(scores.masked_fill(~keep, -torch.inf).softmax(-1)) @ value


class WrittenOut(TorchFunctionMode):
    """torch's function computed by its formula, and edited."""

    def __init__(self, edit: Callable[[Tensor], Tensor] = lambda p: p) -> None:
        super().__init__()
        self.edit = edit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return written_out(*args, **(kwargs or {}), edit=self.edit)
        if func is F.multi_head_attention_forward:  # no mode is on inside
            with patch.object(F, "scaled_dot_product_attention", partial(written_out, edit=self.edit)):
                return func(*args, **{**(kwargs or {}), "need_weights": False})
        return func(*args, **(kwargs or {}))
