"""Models with some attention in transformers' interface and some beside it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from heedful import models

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 64}
IDS = torch.randint(3, 50, (2, 10), generator=torch.Generator().manual_seed(0))
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
HEAD = "vision_model.head.attention"


def siglip(attention: str = "eager") -> Any:
    """Its image's tokens are pooled by torch's own nn.MultiheadAttention."""
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    model = transformers.SiglipModel(config).eval()
    model.set_attn_implementation(attention)
    return model


def both_of(model: Any) -> tuple[Tensor, Tensor]:
    out = model(input_ids=IDS, pixel_values=PICTURES)
    return out.text_embeds, out.image_embeds


def gemma() -> Any:
    """A language model that is shown what a tower of SigLIP sees; the pooling there runs, and nobody looks at it."""
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
    text |= {"layer_types": ["full_attention"] * 2}
    numbers = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=VISION, **numbers)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def shown() -> dict[str, Tensor]:
    """A text with a picture in it."""
    ids = IDS.clone()
    ids[:, 1:5] = 60
    return {"input_ids": ids, "pixel_values": PICTURES, "token_type_ids": (ids == 60).long()}


def git() -> Any:
    """Its texts are read by attention that is written out, its pictures through the interface."""
    config = transformers.GitConfig(vision_config=VISION, **TEXT)
    return transformers.GitForCausalLM(config).eval()


class OwnAttention(nn.Module):
    """Attention beside the interface, in one of several ways."""

    def __init__(self, how: str = "written") -> None:
        super().__init__()
        self.how, self.num_heads = how, 2

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        if self.how == "kernel":
            out = F.scaled_dot_product_attention(heads, heads, heads)
        else:
            weights = (heads @ heads.mT / heads.shape[-1] ** 0.5).softmax(-1)
            out = (weights.square() if self.how == "squared" else weights) @ heads
        return out.transpose(1, 2).flatten(2)


class Beside(nn.Module):
    """A feed-forward part with attention before it."""

    def __init__(self, mlp: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.mlp, self.attention = mlp, attention

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attention(x))


def llama(*attentions: nn.Module | None) -> Any:
    """A decoder whose layers have attention of their own beside that of the interface."""
    model = models.tiny("llama").eval()
    for layer, attention in zip(model.model.layers, attentions, strict=False):
        if attention is not None:
            layer.mlp = Beside(layer.mlp, attention)
    return model
