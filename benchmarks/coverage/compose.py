"""Whole feeds: text with image or sound tokens in it, what else the signature asks for, and retries."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .feeds import BATCH, LENGTH, Feed, Maker, _random, field, parameters

_COUNTS = re.compile(r"features:?\s*(?:torch\.Size\(\[)?(\d+)")
_START = ("vision_start_token_id", "image_start_token_id", "boi_token_id", "im_start_id", "begin_image_token_id")
_END = ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "im_end_id", "end_image_token_id")
_TOKEN = {
    "image": ("image_token_id", "image_token_index", "img_context_token_id", "image_patch_id", "media_token_id"),
    "audio": ("audio_token_id", "audio_token_index", "audio_pad_token_id"),
    "video": ("video_token_id", "video_token_index"),
}
Conversation = Generator[Feed, str, None]


def candidates(model: PreTrainedModel) -> Conversation:
    """Yield feeds until one is accepted; send back the error text of the one just tried."""
    maker = Maker(model)
    if "input_ids" not in maker.names:
        yield from _alone(maker)
        return
    for kind, media in (("image", maker.images()), ("video", _videos(maker)), ("audio", maker.sounds())):
        for feed in media:
            yield from _mixed(maker, kind, feed)
    for feed in _texts(maker):
        yield finish(maker, feed)


def _alone(maker: Maker) -> Conversation:
    for media in (maker.images(), _videos(maker), maker.sounds(), _embedded(maker), _series(maker)):
        for feed in media:
            yield finish(maker, feed)
    yield finish(maker, {})


def _texts(maker: Maker) -> Iterator[Feed]:
    for length in (maker.length(), 64):
        mask = maker.mask(length)
        feed = {"input_ids": maker.pad(maker.text(length), mask)}
        if "attention_mask" in maker.names:
            yield {**feed, "attention_mask": mask}
            yield {"input_ids": maker.text(length), "attention_mask": maker.mask(length, 0)}
        yield {"input_ids": maker.text(length)}
    books = field(maker.config, "num_codebooks", "num_code_groups", "n_codes_total", default=4)
    if field(maker.config, "num_codebooks") is not None:
        ids = maker.text(LENGTH).repeat_interleave(int(books), 0)
        yield {"input_ids": ids, "attention_mask": maker.mask()}
    for wide in (books, books + 1):
        ids = maker.text(LENGTH)[..., None].expand(-1, -1, int(wide)).contiguous()
        yield {"input_ids": ids, "attention_mask": maker.mask()}
        yield {"input_ids": ids}
    ids = maker.text(LENGTH).repeat(int(books), 1)
    yield {"input_ids": ids}


def _videos(maker: Maker) -> Iterator[Feed]:
    if "pixel_values_videos" in maker.names:
        height, width = maker.size()
        frames = int(field(maker.config, "num_frames", "frames_per_clip", "image_num_frames", default=4))
        yield {"pixel_values_videos": _random(BATCH, frames, maker.channels(), height, width, seed=2)}
        yield {"pixel_values_videos": _random(BATCH, maker.channels(), frames, height, width, seed=2)}


def _embedded(maker: Maker) -> Iterator[Feed]:
    width = int(field(maker.config, "hidden_size", "d_model", "n_embd", "d_latents", default=64))
    for name in ("inputs_embeds", "query_embeds", "hidden_states", "inputs", "latents", "noise_embeds"):
        if name in maker.names:
            yield {name: _random(BATCH, LENGTH, width, seed=4)}
            if name == "inputs":
                yield {name: maker.text(), "attention_mask": maker.mask()}
    if "hidden_states" in maker.names:
        yield {"hidden_states": _random(BATCH, width, LENGTH, seed=4)}
        yield {"hidden_states": _random(BATCH, 1, 3840, seed=4)}
    if "states" in maker.names:
        steps = maker.length()
        feed = {n: _by_name(maker, n, steps) for n in ("states", "actions", "rewards", "returns_to_go", "timesteps")}
        yield {**feed, "attention_mask": maker.mask(steps)}
    if "latents" in maker.names:
        yield {"latents": _random(BATCH, width, LENGTH, seed=4)}


def _series(maker: Maker) -> Iterator[Feed]:
    if "past_values" not in maker.names:
        return
    own = maker.config
    lags = max(getattr(own, "lags_sequence", None) or [0])
    past = int(getattr(own, "context_length", None) or 32) + lags
    future = int(getattr(own, "prediction_length", None) or 8)
    width = int(getattr(own, "num_input_channels", 1) or 1)
    values = _random(BATCH, past, seed=5)
    extra = {"past_observed_mask": torch.ones(BATCH, past)}
    known = int(getattr(own, "num_time_features", 0) or 0)
    rich = {
        **extra,
        "past_values": values,
        "past_time_features": _random(BATCH, past, known),
        "future_time_features": _random(BATCH, future, known),
        "future_values": _random(BATCH, future, seed=6),
    }
    yield {k: v for k, v in rich.items() if k in maker.names}
    yield {"past_values": _random(BATCH, past, width, seed=5)}
    yield {"past_values": values, "past_values_padding": torch.zeros(BATCH, past), "freq": torch.zeros(BATCH, 1).long()}
    yield {"past_values": values}


def _mixed(maker: Maker, kind: str, media: Feed) -> Conversation:
    """Text around one image (or sound) per row, with as many placeholder tokens as it has features."""
    if "image_embeds_position_mask" in maker.names and kind == "image":
        count = int(field(maker.config, "latent_query_num", default=8))
        text = _around(maker, count, 3)
        yield finish(maker, {**media, **text, "image_embeds_position_mask": (text["input_ids"] == 3).long()})
    token = next((v for n in _TOKEN[kind] if type(v := field(maker.config, n)) is int), None)
    counts = [0] if token is None else [_features(maker.model, kind, media)]
    for count in counts:
        told = yield finish(maker, {**media, **_around(maker, count, token)})
        for found in _COUNTS.findall(told or "")[-1:]:
            total = int(found)
            if len(counts) < 2 and token is not None and total:
                counts.append(-(-total // BATCH))
                counts.extend([total] if total % BATCH == 0 and total < 300 else [])


def _around(maker: Maker, count: int, token: int | None) -> Feed:
    length = maker.length() + count + (2 if count else 0)
    ids, mask = maker.text(length), maker.mask(length)
    if "attention_mask" in maker.names:
        ids = maker.pad(ids, mask)
    feed = {"attention_mask": mask} if "attention_mask" in maker.names else {}
    if count and token is not None:
        for place, names in ((1, _START), (2 + count, _END)):
            mark = field(maker.config, *names)
            if type(mark) is int:
                ids[:, place] = mark
        ids[:, 2 : 2 + count] = token
        for name in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
            if name in maker.names:
                feed[name] = (ids == token).long()
    return {"input_ids": ids, **feed}


def _features(model: PreTrainedModel, kind: str, media: Feed) -> int:
    """How many tokens per row the model makes of this image or sound; 0 if it will not say."""
    function = getattr(model, f"get_{kind}_features", None)
    inner = getattr(model, "model", None) or getattr(model, "thinker", None)
    function = function or getattr(inner, f"get_{kind}_features", None)
    if function is None:
        return 0
    known = parameters(function)
    with torch.no_grad():
        try:
            made = function(**{k: v.clone() for k, v in media.items() if k in known})
        except Exception:  # noqa: BLE001 - the forward itself will say what is wrong with this feed
            return 0
    made = getattr(made, "pooler_output", made)
    parts = list(made) if isinstance(made, (list, tuple)) else [made]
    parts = [p for p in parts if isinstance(p, Tensor)]
    return sum(p.shape[:-1].numel() for p in parts) // BATCH


def finish(maker: Maker, feed: Feed) -> Feed:
    """Add what the signature needs beyond the main input, and drop what it does not know."""
    own = maker.config
    full = {k: v for k, v in feed.items() if k in maker.names}
    length = next((v.shape[1] for k, v in full.items() if k == "input_ids"), LENGTH)
    if "decoder_input_ids" in maker.names and "decoder_input_ids" not in full:
        full["decoder_input_ids"] = maker.text(8, seed=7, vocab=field(own, "decoder_vocab_size"))
    if "bbox" in maker.names and "input_ids" in full:
        corner = torch.arange(length)[None, :, None].expand(BATCH, -1, 2) * 2
        full["bbox"] = torch.cat([corner, corner + 5], -1)
        if getattr(own, "dim_bbox", 4) == 8:
            full["bbox"] = torch.rand(BATCH, length, 8, generator=torch.Generator().manual_seed(1))
    decoder = vars(own).get("decoder_config")
    books = vars(decoder).get("num_channels") if isinstance(decoder, PreTrainedConfig) else None
    if "decoder_input_ids" in full and type(books) is int:
        full["decoder_input_ids"] = full["decoder_input_ids"][..., None].expand(-1, -1, books).contiguous()
    if "visual_feats" in maker.names:
        full["visual_feats"] = _random(BATCH, 8, int(own.visual_feat_dim), seed=8)
        full["visual_pos"] = _random(BATCH, 8, int(own.visual_pos_dim), seed=9)
    if "encoder_hidden_states" in maker.names and "query_embeds" in full:
        full["encoder_hidden_states"] = _random(BATCH, 16, int(own.encoder_hidden_size), seed=8)
    for name in maker.needed:
        if name not in full:
            full[name] = _by_name(maker, name, length)
    return full


def _by_name(maker: Maker, name: str, length: int) -> Tensor:
    """A tensor for a required parameter that no modality supplied."""
    own = maker.config
    height, width = maker.size()
    hidden = int(field(own, "hidden_size", "d_model", default=64))
    special = {"states": "state_dim", "actions": "act_dim", "state": "max_state_dim", "action_embeds": "max_action_dim"}
    if name in special:
        return _random(BATCH, length, int(field(own, special[name], default=hidden)))
    if name == "context_hidden_states":
        return _random(BATCH, length, hidden * len(field(own, "target_layer_ids", default=[0])))
    if name == "task_inputs":
        return maker.text(int(field(own, "task_seq_len", default=length)))
    if name == "input_values":
        return _random(BATCH, 1, 3840, seed=3)
    if name == "merge_sizes":
        return torch.ones(BATCH, dtype=torch.long)
    if name in ("rewards", "returns_to_go"):
        return _random(BATCH, length, 1)
    if name == "timesteps":
        return torch.arange(length).expand(BATCH, -1)
    if "pixel" in name or name == "prompt_masks":
        return _random(BATCH, maker.channels(), height, width)
    if name.endswith("mask"):
        return maker.mask(length, 0)
    if name.endswith(("ids", "task_inputs")):
        return maker.text(length)
    return _random(BATCH, length, hidden)
