"""What some models are made and called with, where names of arguments do not tell it, or to make them small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FILM: dict[str, Any] = {"sample_width": 32, "sample_height": 32, "sample_frames": 17, "max_text_seq_length": 7}
CONFIG: Mapping[str, dict[str, Any]] = {
    "CogVideoXTransformer3DModel": FILM,
    "ConsisIDTransformer3DModel": FILM,
    "CosmosTransformer3DModel": {"concat_padding_mask": False},  # a mask is resized by torchvision
    "DreamLiteTransformer2DModel": {"in_channels": 64, "cross_attention_dim": 64},
    "EasyAnimateTransformer3DModel": {"out_channels": 4},
    "HunyuanDiT2DControlNetModel": {"hidden_size": 1408},
    "HunyuanDiT2DModel": {"hidden_size": 1408},
}
HUNYUAN_DIT: dict[str, Any] = {
    "hidden_states": ("drawn", 2, 4, 32, 32), "timestep": ("filled", 1.0, 2), "style": ("filled", 0, 2),
    "encoder_hidden_states": ("drawn", 2, 77, 1024), "text_embedding_mask": ("filled", 1, 2, 77),
    "encoder_hidden_states_t5": ("drawn", 2, 256, 2048), "text_embedding_mask_t5": ("filled", 1, 2, 256),
    "image_meta_size": ("filled", 1.0, 2, 6),
}  # fmt: skip
GIVEN: Mapping[str, dict[str, Any]] = {  # an argument by its name; None leaves it out
    "AceStepTransformer1DModel": {
        "hidden_states": ("drawn", 2, 16, 64), "context_latents": ("drawn", 2, 16, 128),
        "encoder_hidden_states": ("drawn", 2, 7, 2048),
    },
    "AnimaTextConditioner": {
        "source_hidden_states": ("drawn", 2, 7, 1024), "target_input_ids": ("filled", 1, 2, 7),
    },
    "AnyFlowTransformer3DModel": {"timestep": ("filled", 1.0, 2, 5), "r_timestep": ("filled", 1.0, 2, 5)},
    "AutoencoderKLHunyuanVideo15": {"sample": ("drawn", 1, 3, 5, 64, 64)},
    "AutoencoderKLMochi": {"sample": ("drawn", 1, 3, 7, 64, 64)},
    "BriaFiboTransformer2DModel": {"text_encoder_layers": [("drawn", 2, 7, 2048)] * 4, "guidance": None},
    "ConsistencyDecoderVAE": {"sample": ("drawn", 2, 3, 32, 32)},
    "ErnieImageTransformer2DModel": {"text_bth": ("drawn", 2, 7, 2560), "text_lens": ("filled", 7, 2)},
    "FluxControlNetModel": {"controlnet_cond": ("drawn", 2, 16, 64)},
    "GlmImageTransformer2DModel": {
        "prior_token_id": ("filled", 1, 2, 256), "prior_token_drop": ("filled", False, 2, 256),
    },
    "HunyuanDiT2DControlNetModel": HUNYUAN_DIT | {"controlnet_cond": ("drawn", 2, 4, 32, 32)},
    "HunyuanDiT2DModel": HUNYUAN_DIT,
    "HunyuanVideo15Transformer3DModel": {
        "encoder_hidden_states_2": ("drawn", 2, 7, 1472), "encoder_attention_mask_2": ("filled", 1, 2, 7),
        "image_embeds": ("drawn", 2, 5, 1152),
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        "image_embeds": ("drawn", 2, 5, 1152), "indices_latents": ("filled", 1, 1, 5),
    },
    "I2VGenXLUNet": {"image_latents": ("drawn", 2, 4, 5, 32, 32), "image_embeddings": ("drawn", 2, 1024)},
    "Kandinsky6SRTransformer3DModel": {"hidden_states": ("drawn", 2, 5, 32, 32, 129)},
    "Kandinsky6Transformer3DModel": {
        "hidden_states": ("drawn", 2, 5, 32, 32, 33), "encoder_attention_mask": ("filled", True, 2, 7),
    },
    "Krea2Transformer2DModel": {
        "hidden_states": ("drawn", 2, 16, 64), "encoder_hidden_states": ("drawn", 2, 7, 12, 2560),
        "encoder_attention_mask": ("filled", True, 2, 7), "position_ids": ("filled", 0.0, 23, 3),
    },
}  # fmt: skip

UNET: dict[str, Any] = {"block_out_channels": (64, 64, 64, 64), "cross_attention_dim": 64}
VIDEO: dict[str, Any] = {"block_out_channels": (32, 32, 64, 64, 64)}
TOWER: dict[str, Any] = {"context_length": 76, "width": 64, "heads": 4, "layers": 2}
IMAGE: dict[str, Any] = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 32, "output_tokens": True}
NARROW: Mapping[str, dict[str, Any]] = {  # sizes under which a large model has weights that one can hold
    "AuraFlowTransformer2DModel": {
        "num_attention_heads": 4, "attention_head_dim": 32, "joint_attention_dim": 64, "caption_projection_dim": 128,
    },
    "AutoencoderKLHunyuanImageRefiner": VIDEO,
    "AutoencoderKLHunyuanVideo15": VIDEO,
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (32, 32, 64, 64), "decoder_block_out_channels": (32, 32, 64, 64),
    },
    "ChromaTransformer2DModel": {"num_attention_heads": 4, "joint_attention_dim": 64, "approximator_hidden_dim": 64},
    "ConsistencyDecoderVAE": {"encoder_block_out_channels": (64,) * 4, "decoder_block_out_channels": (64,) * 4},
    "ControlNetModel": UNET,
    "DreamLiteUNetModel": {
        "block_out_channels": (64, 128, 128), "cross_attention_dim": 64, "attention_head_dim": 8,
    },
    "ErnieImageTransformer2DModel": {"hidden_size": 512, "num_attention_heads": 4, "ffn_hidden_size": 128},
    "HunyuanDiT2DControlNetModel": {"transformer_num_layers": 4},
    "I2VGenXLUNet": {"block_out_channels": (64, 64, 64, 64)},
    "JoyImageEditTransformer3DModel": {"num_attention_heads": 4, "hidden_size": 512, "text_dim": 64},
    "Kandinsky3UNet": UNET | {"encoder_hid_dim": 64, "time_embedding_dim": 64},
    "Kandinsky6Transformer3DModel": {"model_dim": 512, "ff_dim": 256, "time_dim": 64},
    "Krea2Transformer2DModel": {
        "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 128, "text_intermediate_size": 128,
    },
    "Lumina2Transformer2DModel": {
        "hidden_size": 384, "num_attention_heads": 4, "num_kv_heads": 2, "cap_feat_dim": 64,
    },
    "UNet3DConditionModel": UNET,
    "coca_ViT-B-32": {
        "embed_dim": 64, "vision_cfg": IMAGE | {"attentional_pool": True, "attn_pooler_heads": 8},
        "text_cfg": TOWER | {"vocab_size": 49408, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TOWER | {"vocab_size": 49408, "attn_pooler_heads": 8},
    },
    "coca_roberta-ViT-B-32": {
        "vision_cfg": IMAGE | {"width": 768}, "multimodal_cfg": TOWER | {"width": 768, "heads": 8},
    },
    "davit_base_fl": {"depths": (1, 1, 2, 1), "embed_dims": (32, 64, 128, 256), "num_heads": (2, 4, 8, 16)},
    "mobilenetv5_300m_enc": {"channel_multiplier": 0.25, "side": 256},
    "vit_base_patch16_sapiens2": {"img_size": 224},
}  # fmt: skip
