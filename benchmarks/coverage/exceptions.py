"""What no rule over field names finds out: settings of single model types, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig, ResNetConfig

New = Mapping[str, Any]

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_PICTURES = {f"<|visual token {i:06d}|>": 110 + i for i in range(40)}

# model type -> settings that replace what the rules made of them
TABLE: dict[str, dict[str, Any]] = {
    # the default has only linear layers, which its own cache refuses
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    # a list inside a list, multiplied out
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    # per-layer lists without a default
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    # two layers must share their weights, so two hybrid ones
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    # the default configuration lacks what its own model reads
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "esm": {"pad_token_id": 1, "mask_token_id": 32},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "hunyuan_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64,
    },
    "xmod": {"default_language": "en_XX"},
    "granite4_vision": {"deepstack_layer_map": [(-1, 0)], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    # ids of picture tokens are looked up by their names
    "chameleon": {"vocabulary_map": {"<image>": 150} | {f"IMGIMG{chr(65 + i)}Z": 110 + i for i in range(26)}},
    "emu3": {"vocabulary_map": {"<image>": 150, "<|extra_200|>": 151} | _PICTURES},
    # the cache is built from layer counts the outer configuration does not have
    "blt": {"use_cache": False},
    # first stage width and picture grids are stated twice
    "sam2_hiera_det_model": {"hidden_size": 32, "global_attention_blocks": [4]},
    "sam2_vision_model": {
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "backbone_channel_list": [256, 128, 64, 32],
    },
    "sam2_prompt_encoder": {"patch_size": 16},
    # no scale by default, hence no map for the decoder
    "lw_detr": {"projector_scale_factors": [1.0]},
    # the heads divide neither 261 nor 322 input channels
    "perceiver": {"num_cross_attention_heads": 1},
    # token ids that are no fields
    "shieldgemma2": {"yes_token_index": 20, "no_token_index": 21},
    # pictures are four times the patch of the finest scale
    "depth_pro": {"patch_size": 64, "intermediate_hook_ids": [1, 0]},
    # each stage must have more blocks than its number
    "cvt": {"depth": [1, 2, 3]},
    # the sliding mask is made whether or not a layer slides
    "step3p5": {"sliding_window": 8},
}  # fmt: skip


def small_resnet(features: int) -> ResNetConfig:
    """A backbone in place of a timm one, which transformers cannot build without the timm library."""
    stages = [f"stage{i}" for i in range(5 - features, 5)]
    return ResNetConfig(embedding_size=32, hidden_sizes=[32, 32, 64, 64], depths=[1, 1, 1, 1], out_features=stages)


def _layers_own_their_cache(new: New) -> dict[str, Any]:
    return {"kv_source_layers": list(range(new["num_hidden_layers"]))}


DERIVED: dict[str, Callable[[New], dict[str, Any]]] = {"mistral_large4_text": _layers_own_their_cache}


def overrides(config: PreTrainedConfig, new: New) -> dict[str, Any]:
    """The settings of this configuration that replace what the rules made of it."""
    found: dict[str, Any] = {}
    backbone = getattr(new.get("backbone_config"), "model_type", "")
    channels = new.get("encoder_in_channels")
    if channels is not None and backbone and len(channels) == 3:
        # a stack of three maps with stated channels: one backbone that fits
        found = {"backbone_config": small_resnet(3), "encoder_in_channels": [32, 64, 64]}
        if "decoder_in_channels" in new:
            found["decoder_in_channels"] = [new.get("d_model", new.get("hidden_size", 64))] * 3
        if "x4_feat_dim" in new:
            found |= {"backbone_config": small_resnet(4), "x4_feat_dim": 32}
    elif "auxiliary_in_channels" in new or "auxiliary_channels" in new:
        found["backbone_config"] = small_resnet(4)
    elif backbone == "timm_backbone":
        found["backbone_config"] = small_resnet(3 if new.get("num_feature_levels", 1) > 1 else 1)
    derived = DERIVED.get(config.model_type)
    return found | TABLE.get(config.model_type, {}) | (derived(new) if derived else {})
