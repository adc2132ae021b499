"""What a field's name says about its size: the tables behind `shrink`."""

from __future__ import annotations

import re
from dataclasses import dataclass

VOCAB = 160
TEXT = 100
CODES = 128
IMAGE = 64


@dataclass(frozen=True)
class Plan:
    """How hard to shrink; a field of a plan named in a table is the limit there."""

    width: int = 64
    ffn: int = 128
    heads: int = 4
    kv: int = 2
    head: int = 16
    small: int = 32
    widths: bool = True
    images: bool = True


PLANS = (
    Plan(),
    Plan(kv=4),
    Plan(width=512, head=128, ffn=512, small=64),
    Plan(widths=False),
    Plan(widths=False, images=False),
)

Table = list[tuple[str, int | str]]

DEPTH: Table = [
    (r"num_kv_shared_layers|num_nextn_predict_layers|.*mtp_.*|num_hash_layers|insert_layer_id", 0),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|(.*_)?layer_offset", 1),
    (r".*(period|interval|pattern|sparse_step|_every_n.*|layer_freq|layer_frequency|_step)", 2),
    (r"(.*_)?(layers|n_layers?|num_blocks|depth)|num_self_attends_per_block|num_hidden_layers.*", 2),
    (r"num_layers_per_stack|n_layers_per_attn_res_block", 2),
]
WIDTH: Table = [
    (r"(.*_)?(key_value|kv)_heads|num_query_groups|num_key_value_attention_heads|n_head_kv", "kv"),
    (r"(.*_)?num_key_value_heads", "kv"),
    (r"(.*_)?(heads|n_heads?)", "heads"),
    (r"mamba_d_head|mamba_head_dim", 32),
    (r"mamba_d_ssm", "ffn"),
    (r"(.*_)?head_(dim|size)|kv_channels|dim_head|d_kv|(key|value)_dim|rotary_dim|query_pre_attn_scalar", "head"),
    (r".*_rank", 32),
    (r"(.*_)?(ffn|intermediate|mlp|feed_?forward|inner|ff)(_hidden)?_(size|dims?)|d_ff|n_inner|d_inner", "ffn"),
    (r".*intermediate_(size|dim).*|feed_forward_size|(.*_)?dim_feedforward", "ffn"),
    (r"hidden_size_per_layer_input", 32),
    (r"(.*_)?(hidden|embed(ding)?|projection|model|proj|fusion|feature)_(size|dims?)", "width"),
    (r"(.*_)?(output|out|input|in|fpn|mask|latent)_(size|dims?)", "width"),
    (r"(.*_)?(n_embd|d_model|hidden_channels|width|conv_channels|d_latents|(qk|v)_channels)", "width"),
    (r"dim|(.*_)?(dim|hidden_size|embedding_size)|hidden_size.*|.*embed_dim.*", "width"),
    (r"(.*_)?n(um)?_groups?|topk_group", 1),
    (r"(.*_)?(num|n)_shared_experts|zero_expert_num", 1),
    (r"(.*_)?(num_experts_per_tok(en)?|top_k|topk|top_k_experts|moe_k|num_selected_experts)", 2),
    (r"(.*_)?(num|n)_(local_|routed_)?experts", 4),
    (r"(.*_)?base_channels", 32),
    (r"state_size|.*d_state|ssm_state_size", 16),
    (r"(.*_)?chunk_size", 8),
    (r"codebook_size|num_embeddings|codebook_vocab_size|quantizer_bins", CODES),
    (r"num_codebooks|num_code_groups|num_quantizers", 4),
    (r"num_(queries|query_tokens|denoising|object_queries|latent_queries|latents)|latent_query_num|n_latents", 8),
    (r"num_conv_pos_embeddings?|num_conv_pos_embedding_groups", 16),
]
TOKENS: Table = [
    (r"(.*_)?vocab_size(_per_layer_input)?", VOCAB),
    (r"sliding_window(_size)?|local_attention|window_size|attention_chunk_size|.*attention_window(_size)?", 8),
    (r"index_topk|(index_)?block_size|(lsh|local)_attn_chunk_length|local_radius", 8),
    (r"index_kpool", 4),
    (r"n_positions|(.*_)?max_(.*_)?position_embeddings|n_ctx|max_seq_len.*|max_sequence_length", 512),
    (r"max_(source|target)_positions|max_(source|target|text)_length|max_pos_emb", 512),
]
IMAGES: Table = [
    (r"(.*_)?(image|img|input|train|crop|tile|anchor_image)_sizes?", IMAGE),
    (r"(vision_)?patch_size", 8),
    (r"(num_)?frames(_per_clip)?", 4),
    (r"num_mel_bins|input_feat_per_channel", 80),
]
FILL: dict[str, int | str] = {
    "head_dim": "head",
    "num_key_value_heads": "kv",
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": VOCAB,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "prediction_length": 16,
    "top_k_experts": 2,
    "image_token_index": 157,
    "image_token_id": 157,
    "video_token_index": 158,
    "audio_token_id": 159,
}
DEPTH_LIST = r"depths?|num_block_repeats|layer_depths|num_blocks|blocks_per_stage|stage_num.*|num_conv_blocks"
HEADS_LIST = r".*heads(_per_stage)?"
WIDTH_LIST = (
    r"(.*_)?(hidden_sizes|embed_dims?|dims|channels|conv_dim|tdnn_dim|embed_dim_per_stage|hidden_dims|"
    r"unit_dims|channel_list|hidden_size|out_channels|in_channels)"
)
LAYER_INDEX = (
    r".*(layer|layers|block|attn|att)_?(idx|idxs|index|indexes|indices|ids|id)|vision_feature_layer|"
    r"deepstack.*|.*_target_layers|global_attention_blocks|cross_attention_layers|.*layer_ids|global_attn_indexes"
)
TOKEN_ID = (
    r".*(token|bos|eos|pad|start|end|sep|newline|patch|placeholder|im_start|im_end)(_token)?_(id|ids|index)|"
    r".*_token_.*(id|index)s?"
)


def limit(table: Table, name: str, plan: Plan) -> int | None:
    """The limit of the first rule that fits the whole name."""
    for pattern, bound in table:
        if re.fullmatch(pattern, name):
            return getattr(plan, bound) if isinstance(bound, str) else bound
    return None
