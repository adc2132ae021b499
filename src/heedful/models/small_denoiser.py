"""A small diffusion transformer that draws two coloured things from words, trained from nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from heedful.core.errors import ModelError
from heedful.core.kinds.loaded import Loaded
from heedful.models.two_things import SIDE, WORDS

PATCH, WIDTH, HEADS, LAYERS, LENGTH = 2, 64, 4, 3, 5
GRID = SIDE // PATCH
FILE = Path(__file__).with_suffix(".safetensors")


class Attention(nn.Module):
    """Self-attention, or cross-attention to `context`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        both: Tensor = self.kv(x if context is None else context)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q(x), *both.chunk(2, -1)))
        found: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


class Block(nn.Module):
    """Self-attention, cross-attention and a feed-forward part; time scales and shifts what the first and last see."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn, self.cross = Attention(), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH))
        self.table = nn.Parameter(torch.randn(6, WIDTH) * 0.02)

    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = (self.table + time).unbind(1)
        x = x + gate[:, None] * self.attn(self.norm(x) * (1 + scale[:, None]) + shift[:, None])
        x = x + self.cross(self.norm(x), context=context)
        return x + gate_2[:, None] * self.mlp(self.norm(x) * (1 + scale_2[:, None]) + shift_2[:, None])


class Denoiser(nn.Module):
    """A diffusion transformer that tells the way from picture to noise, for noised pictures `[b 3 16 16]`."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH))  # the place of a word tells whose it is
        self.patches = nn.Linear(3 * PATCH**2, WIDTH)
        self.position = nn.Parameter(torch.randn(GRID**2, WIDTH) * 0.5)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * PATCH**2)

    def read(self, words: Tensor) -> Tensor:
        """Words `[b 5]` as the cross-attention sees them, `[b 5 e]`."""
        return self.words(words) + self.places

    def forward(self, noised: Tensor, t: Tensor, context: Tensor) -> Tensor:
        turns = (
            1000 * t[:, None] * torch.exp(torch.arange(WIDTH // 2, device=t.device) * (-math.log(10000) / (WIDTH // 2)))
        )
        kind = self.position.dtype  # in half precision too, noise and time are told in single
        time = self.time(torch.cat([turns.sin(), turns.cos()], -1).to(kind)).unflatten(-1, (6, WIDTH))
        x = self.patches(F.pixel_unshuffle(noised.to(kind), PATCH).flatten(2).transpose(1, 2)) + self.position
        for block in self.blocks:
            x = block(x, context, time)
        return F.pixel_shuffle(self.out(self.norm(x)).transpose(1, 2).unflatten(-1, (GRID, GRID)), PATCH)


def denoiser(**kw: Any) -> Loaded:
    """A diffusion transformer of 0.2M parameters that draws two coloured things from words, in float32."""
    if kw:
        raise ModelError(f"the small denoiser is loaded as it is, without {', '.join(kw)}: heedful.models.denoiser()")
    model = Denoiser()
    model.load_state_dict(load_file(FILE))
    return Loaded(model.eval().requires_grad_(False), speller(), "the small denoiser")


def speller() -> Any:
    """What makes tokens of the denoiser's words."""
    backend = Tokenizer(WordLevel({word or "<>": i for i, word in enumerate(WORDS)}, unk_token="<>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)
