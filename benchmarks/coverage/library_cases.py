"""Small random models of timm, diffusers and open_clip, and how each is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from benchmarks.beside_torch import library

PICTURES = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = dict(embed_dim=32, depth=2, num_heads=4, num_classes=5, img_size=(16, 32), patch_size=4)


class Case(NamedTuple):
    """A model, and how it is called."""

    model: nn.Module
    call: Callable[[], Any]
    layers: int
    cross: tuple[bool, ...] = ()


def drawn(model: nn.Module, std: float = 0.2) -> Any:
    """Weights under which attention matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            of_norm = p.ndim == 1 and not name.endswith("bias")
            p.normal_(float(of_norm), std if p.ndim > 1 else 0.1, generator=generator)
    return model.eval()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def vit(name: str = "vit_tiny_patch16_224", **how: Any) -> Any:
    return drawn(library("timm").create_model(name, **{**SMALL, **how}))


def of_timm(name: str, **how: Any) -> Case:
    model = vit(name, **how)
    return Case(model, lambda: model(PICTURES), 2, (False, False))


def unet() -> Case:
    model = drawn(diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    ))  # fmt: skip
    x, words = draw(1, 4, 8, 8), draw(1, 7, 16)
    return Case(model, lambda: model(x, 1, encoder_hidden_states=words).sample, 8, (False, True) * 4)


TEXT: dict[str, Any] = dict(joint_attention_dim=16, num_attention_heads=2)


def sd3() -> Case:
    model = drawn(diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, caption_projection_dim=16,
        pooled_projection_dim=16, out_channels=4, **TEXT,
    ))  # fmt: skip
    how = dict(encoder_hidden_states=draw(1, 7, 16), pooled_projections=draw(1, 16), timestep=torch.tensor([1]))
    return Case(model, lambda: model(draw(1, 4, 8, 8), **how).sample, 2, (False,) * 2)


def flux() -> Case:
    """Whose queries are named."""
    model = drawn(diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8], **TEXT,
    ))  # fmt: skip
    how = dict(
        encoder_hidden_states=draw(1, 7, 16), pooled_projections=draw(1, 16), timestep=torch.tensor([1.0]),
        img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(7, 3),
    )  # fmt: skip
    return Case(model, lambda: model(draw(1, 16, 4), **how).sample, 2, (False,) * 2)


def pixart() -> Case:
    model = drawn(diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=16, out_channels=8, num_embeds_ada_norm=8, caption_channels=None,
        use_additional_conditions=False,
    ))  # fmt: skip
    how = dict(
        encoder_hidden_states=draw(1, 7, 16), timestep=torch.tensor([1]),
        encoder_attention_mask=torch.tensor([[1.0] * 5 + [0.0] * 2]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )  # fmt: skip
    return Case(model, lambda: model(draw(1, 4, 8, 8), **how).sample, 4, (False, True) * 2)


def dit() -> Case:
    model = drawn(diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=8,
    ))  # fmt: skip
    how = dict(timestep=torch.tensor([1]), class_labels=torch.tensor([1]))
    return Case(model, lambda: model(draw(1, 4, 8, 8), **how).sample, 2, (False,) * 2)


def clip_model() -> Any:
    library("open_clip")
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    image = CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=8, image_size=32)
    return drawn(CLIP(32, image, CLIPTextCfg(context_length=9, vocab_size=64, width=32, heads=4, layers=2)), 0.1)


def clip() -> Case:
    model = clip_model()
    words = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    return Case(model, lambda: torch.stack(model(draw(2, 3, 32, 32), words)[:2]), 4, (False,) * 4)


def unet2d() -> Case:
    model = drawn(diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ))  # fmt: skip
    return Case(model, lambda: model(draw(1, 3, 8, 8), 1).sample, 4, (False,) * 4)


def autoencoder() -> Case:
    model = drawn(diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ))  # fmt: skip
    return Case(model, lambda: model(draw(1, 3, 16, 16)).sample, 2, (False,) * 2)
