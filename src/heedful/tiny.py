"""Tiny random models, one a way of attending, for tests and laws: no files, no network, the same weights for a seed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from heedful.core.asked import asks
from heedful.core.errors import FieldError, ModelError, nearest


class _Kind(NamedTuple):
    about: str  # what it is there for
    model_type: str
    auto: str
    config: dict[str, Any]


_CAUSAL, _SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
_TOKENS: dict[str, Any] = dict(vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_BLOCKS: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
_LLAMA: dict[str, Any] = dict(**_TOKENS, **_BLOCKS, num_key_value_heads=2, max_position_embeddings=512)
_IMAGE: dict[str, Any] = dict(image_size=8, patch_size=4, num_channels=3)
_SPLIT: dict[str, Any] = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    decoder_start_token_id=1,
)
_WINDOW: dict[str, Any] = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])

_KINDS = {
    "llama": _Kind("text, two query heads a key head", "llama", _CAUSAL, _LLAMA),
    "mha": _Kind("text, as many key heads as query heads", "llama", _CAUSAL, {**_LLAMA, "num_key_value_heads": 4}),
    "mqa": _Kind("text, one key head", "llama", _CAUSAL, {**_LLAMA, "num_key_value_heads": 1}),
    "odd_head_dim": _Kind("text, heads of an unusual width, 10", "llama", _CAUSAL, {**_LLAMA, "head_dim": 10}),
    "gpt2": _Kind(
        "text, learned positions",
        "gpt2",
        _CAUSAL,
        dict(
            **_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        ),
    ),
    "bert": _Kind(
        "text, seen both ways",
        "bert",
        "AutoModelForMaskedLM",
        dict(**_TOKENS, **_BLOCKS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    ),
    "qwen3": _Kind("text, queries and keys normalised", "qwen3", _CAUSAL, {**_LLAMA, "head_dim": 16}),
    "gemma2": _Kind(
        "text, capped scores, a window in one layer",
        "gemma2",
        _CAUSAL,
        {**_LLAMA, **_WINDOW, "head_dim": 16, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    ),
    "mistral": _Kind(
        "text, a window in every layer", "mistral", _CAUSAL, {**_LLAMA, "head_dim": 8, "sliding_window": 4}
    ),
    "t5": _Kind(
        "text to text, a bias for each distance",
        "t5",
        _SEQ2SEQ,
        dict(**_TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0)
        | dict(decoder_start_token_id=0, relative_attention_num_buckets=8, relative_attention_max_distance=16),
    ),
    "bart": _Kind(
        "text to text, learned positions",
        "bart",
        _SEQ2SEQ,
        dict(**_TOKENS, **_SPLIT, max_position_embeddings=512, dropout=0.0, forced_eos_token_id=None),
    ),
    "vit": _Kind("images", "vit", "AutoModelForImageClassification", dict(**_BLOCKS, **_IMAGE)),
    "clip": _Kind(
        "images and texts, an encoder each",
        "clip",
        "AutoModel",
        dict(
            projection_dim=16,
            text_config=dict(**_TOKENS, **_BLOCKS, max_position_embeddings=64),
            vision_config=dict(**_BLOCKS, **_IMAGE),
        ),
    ),
    "whisper": _Kind(
        "sound to text",
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        dict(**_TOKENS, **_SPLIT, num_mel_bins=8, max_source_positions=10, max_target_positions=64),
    ),
    "llava": _Kind(
        "text with images in it",
        "llava",
        "AutoModelForImageTextToText",
        dict(
            text_config=dict(_LLAMA, model_type="llama"),
            vision_config=dict(model_type="clip_vision_model", projection_dim=16, **_BLOCKS, **_IMAGE),
            image_token_index=127,
            image_seq_length=4,
            vision_feature_layer=-1,  # the usual -2 would leave the last vision layer without effect
        ),
    ),
    "gpt_oss": _Kind(
        "text, a learned sink for each head, a window in one layer",
        "gpt_oss",
        _CAUSAL,
        {**_LLAMA, **_WINDOW, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
        | dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    ),
    "falcon": _Kind(
        "text, beside transformers' attention interface",
        "falcon",
        _CAUSAL,
        dict(**_TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=48)
        | dict(max_position_embeddings=512),
    ),
    "bloom": _Kind(
        "text, beside that interface too, a bias for each distance",
        "bloom",
        _CAUSAL,
        dict(**_TOKENS, hidden_size=32, n_layer=2, n_head=4),
    ),
}


def kinds() -> dict[str, str]:
    """What each tiny model is there for, by the name that `tiny` knows."""
    return {name: kind.about for name, kind in _KINDS.items()}


@asks
def tiny(
    kind: str = "llama",
    *,
    seed: int = 0,
    std: float = 0.3,
    attn_implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model of that kind in eval mode, with config fields overridden; sub-configs are merged, not replaced.

    `std` is the spread of every weight. The usual 0.02 gives nearly uniform attention, which hides mistakes.
    """
    if kind not in _KINDS:
        raise ModelError(f"no tiny model {kind!r}.{nearest(kind, _KINDS)} Known: {', '.join(_KINDS)}")
    if not std > 0:
        raise FieldError("tiny", "std", std, "must be above 0, else nothing attends to anything", 0.3)
    row = _KINDS[kind]
    plain = AutoConfig.for_model(row.model_type)
    fields = {**plain.to_dict(), **plain.attribute_map}
    for name in overrides:
        if name not in fields:
            raise ModelError(f"tiny({kind!r}) has no config field {name!r}.{nearest(name, fields)}")
    settings = dict(row.config)
    for name, value in overrides.items():
        inner = settings.get(name)
        settings[name] = {**inner, **value} if isinstance(inner, dict) and isinstance(value, dict) else value
    config = AutoConfig.for_model(row.model_type, **settings)
    how = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # on the CPU, and no other device is seeded
        model = getattr(transformers, row.auto).from_config(config, dtype=torch.float32, **how)
    _draw(model, std, torch.Generator().manual_seed(seed))
    return model.to(dtype).eval()


@torch.no_grad()
def _draw(model: PreTrainedModel, std: float, generator: torch.Generator) -> None:
    """Matrices at `std`; biases, norms and sinks get noise on top: left at 0 or 1 they would hide mistakes."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, std, generator=generator)
        else:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def tiny_inputs(model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random arguments for `model(**inputs)`: token ids without special or padding ones, images, sound frames."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    if min(batch, length) < 1:
        raise FieldError("tiny_inputs", "batch, length", (batch, length), "both must be 1 or more", (2, 12))

    def ids() -> torch.Tensor:
        return torch.randint(3, config.get_text_config().vocab_size - 1, (batch, length), generator=generator)

    def images(size: int) -> torch.Tensor:
        return torch.randn(batch, 3, size, size, generator=generator).to(model.dtype)

    if config.model_type == "whisper":
        frames = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        return {"input_features": frames.to(model.dtype), "decoder_input_ids": ids()}
    if config.model_type == "vit":
        return {"pixel_values": images(config.image_size)}
    inputs = {"input_ids": ids()}
    if config.model_type in ("clip", "llava"):
        inputs["pixel_values"] = images(config.vision_config.image_size)
    if config.model_type == "llava":
        tokens = config.image_seq_length
        if length < tokens + 2:
            raise FieldError(
                "tiny_inputs", "length", length, f"llava needs {tokens} image tokens and 2 more", tokens + 2
            )
        inputs["input_ids"][:, 1 : 1 + tokens] = config.image_token_index
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids()
    return inputs
