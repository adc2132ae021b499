"""Inputs for one forward of a model, guessed from its signature and its configuration.

`candidates` yields dictionaries from the richest (image or sound and text, padded) to the plainest; the
first that runs and gives finite floats is kept.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .rules import TEXT, VOCAB

BATCH = 2
LENGTH = 20
PADDING = 6

_MEL_FIELDS = (
    "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "input_feat_size",
    "input_dim", "n_mels", "mel_bins", "num_mel_filters", "feat_dim", "audio_dim",
)  # fmt: skip
_SOUND_FIELDS = ("input_features", "input_values", "audio_mel", "audio_input_features")
_SOUND_MASK = r"(input_features|feature_attention|audio_mel|padding|attention|input_values|audio_attention)_mask"

Feed = dict[str, Tensor]


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of a forward, without self and without **kwargs."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = inspect.signature(function).parameters
    return {name: p for name, p in found.items() if name != "self" and p.kind not in kinds}


def configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The configuration and every one nested in it, outermost first."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs(value)


def field(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of these fields that is set anywhere, outer configurations first."""
    for name in names:
        for one in configs(config):
            value = vars(one).get(name)
            if value is not None:
                return value
    return default


def vision(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of the configuration that speaks of images."""
    for name in ("vision_config", "backbone_config", "image_config", "image_encoder_config", "encoder"):
        inner = vars(config).get(name)
        if isinstance(inner, PreTrainedConfig):
            return inner
    return config


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _side(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        value = value.get("height", 64), value.get("width", 64)
    if isinstance(value, (list, tuple)):
        return (int(value[0]), int(value[-1]))
    return int(value), int(value)


class Maker:
    """Knows one model's sizes, and makes its tensors by name."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config
        self.names = parameters(model.forward)
        self.needed = [n for n, p in self.names.items() if p.default is inspect.Parameter.empty]

    def text(self, length: int = LENGTH, seed: int = 1, vocab: int | None = None) -> Tensor:
        """Ordinary token ids, right padded in the second row where a pad id is known."""
        top = min(vocab or int(field(self.config, "vocab_size", "n_tokens", default=TEXT) or TEXT), TEXT)
        return torch.randint(min(10, top - 1), top, (BATCH, length), generator=torch.Generator().manual_seed(seed))

    def mask(self, length: int = LENGTH, padding: int = PADDING) -> Tensor:
        mask = torch.ones(BATCH, length, dtype=torch.long)
        mask[1, length - padding :] = 0
        return mask

    def length(self) -> int:
        """How long a text may be, at most `LENGTH`."""
        limits = [vars(one).get("max_position_embeddings") for one in configs(self.config) if "vocab_size" in vars(one)]
        return min([LENGTH, *(v for v in limits if type(v) is int and v > 4)])

    def pad(self, ids: Tensor, mask: Tensor) -> Tensor:
        pad = getattr(self.config, "pad_token_id", None)
        if pad is None:
            pad = field(self.config, "pad_token_id", default=0)
        return ids.masked_fill(mask == 0, int(pad) if isinstance(pad, int) and 0 <= pad < VOCAB else 0)

    def size(self) -> tuple[int, int]:
        """Image height and width."""
        for one in (vision(self.config), *configs(self.config)):
            for name in ("image_size", "img_size", "input_size", "train_size", "crop_size"):
                value = vars(one).get(name)
                if isinstance(value, (int, list, tuple, dict)) and value and value is not True:
                    return _side(value)
        return (64, 64)

    def channels(self) -> int:
        for one in (vision(self.config), *configs(self.config)):
            for name in ("num_channels", "in_channels", "in_chans", "num_channel"):
                value = vars(one).get(name)
                if type(value) is int and value <= 8:
                    return value
        return 3

    def patch(self) -> int:
        inner = vision(self.config)
        value = vars(inner).get("patch_size") or field(self.config, "patch_size", default=8)
        return int(value[0] if isinstance(value, (list, tuple)) else value)

    def audio_width(self) -> int:
        own = vars(self.config)
        for one in (own.get("audio_config"), own.get("encoder_config"), *configs(self.config)):
            for name in _MEL_FIELDS if isinstance(one, PreTrainedConfig) else ():
                if type(vars(one).get(name)) is int:
                    return int(vars(one)[name])
        return 80

    def images(self) -> Iterator[Feed]:
        """Ways to hand over one image per row."""
        height, width = self.size()
        chans, patch = self.channels(), self.patch()
        plain = _random(BATCH, chans, height, width, seed=2)
        sizes = torch.tensor([[height, width]] * BATCH)
        has = self.names.__contains__
        key = next((k for k in ("pixel_values", "flattened_patches", "hidden_states", "image_patches") if has(k)), "")
        if not key or (key == "hidden_states" and not has("grid_thw")):
            return
        if has("image_grid_thw") or has("grid_thw"):
            yield from self._packed(key, chans, patch, height, width)
        if has("image_grid_hws") or has("image_grid_hw"):
            rows, columns = height // patch, width // patch
            yield {key: _random(BATCH * rows * columns, chans, patch, patch, seed=2),
                   "image_grid_hws": torch.tensor([[rows, columns]] * BATCH)}  # fmt: skip
        if has("spatial_shapes"):
            rows, columns = height // patch, width // patch
            yield {key: _random(BATCH, rows * columns, chans * patch * patch, seed=2),
                   "pixel_attention_mask": torch.ones(BATCH, rows * columns, dtype=torch.long),
                   "spatial_shapes": torch.tensor([[rows, columns]] * BATCH)}  # fmt: skip
        if has("image_position_ids") or has("pixel_position_ids"):
            name = "image_position_ids" if has("image_position_ids") else "pixel_position_ids"
            rows, columns = height // patch, width // patch
            grid = torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy"), -1)
            yield {key: _random(BATCH, rows * columns, chans * patch * patch, seed=2),
                   name: grid.reshape(1, -1, 2).expand(BATCH, -1, -1).contiguous()}  # fmt: skip
        if has("image_sizes") or has("pixel_attention_mask") or has("pixel_mask"):
            many = plain[:, None].expand(-1, 3, -1, -1, -1).contiguous()
            wide = torch.tensor([[height, 2 * width]] * BATCH)
            if field(self.config, "image_grid_pinpoints") is not None:
                yield {key: many, "image_sizes": wide}
            if has("image_sizes"):
                yield {key: plain, "image_sizes": sizes}
            if has("pixel_attention_mask"):
                one = plain[:, None]
                yield {key: one, "pixel_attention_mask": torch.ones(BATCH, 1, height, width, dtype=torch.long)}
            if has("pixel_mask"):
                yield {key: plain, "pixel_mask": torch.ones(BATCH, height, width, dtype=torch.long)}
        if has("aspect_ratio_ids"):
            tiles = int(field(self.config, "max_num_tiles", default=4))
            mask = torch.ones(BATCH, 1, tiles, dtype=torch.long)
            yield {key: _random(BATCH, 1, tiles, chans, height, width, seed=2), "aspect_ratio_mask": mask,
                   "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
                   "cross_attention_mask": torch.ones(BATCH, LENGTH, 1, tiles, dtype=torch.long)}  # fmt: skip
        if has("target_sizes"):
            rows, columns = height // patch, width // patch
            packed = _random(1, chans, patch, BATCH * rows * columns * patch, seed=2)
            yield {key: packed, "target_sizes": torch.tensor([[rows, columns]] * BATCH)}
            yield {key: plain, "target_sizes": torch.tensor([[rows, columns]] * BATCH)}
        if has("image_attention_mask"):
            yield {key: plain[:, None], "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.long)}
        if has("pixel_attention_mask"):
            yield {key: plain[:, None], "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool)}
        frames = field(self.config, "num_frames", "frames_per_clip", "num_image_with_embedding", default=2)
        video = _random(BATCH, int(frames), chans, height, width, seed=2)
        if field(self.config, "num_frames", "frames_per_clip", "tubelet_size") is not None:
            yield {key: video}
        yield {key: plain}
        yield {key: plain[:, None]}
        yield {key: video}
        rows, columns = height // patch, width // patch
        yield {key: _random(BATCH, rows * columns, chans * patch * patch, seed=2)}
        yield {key: _random(1, chans, 4 * height, 4 * width, seed=2)}
        place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).reshape(-1, 2)
        rest = _random(BATCH, rows * columns, chans * patch * patch, seed=2)
        yield {key: torch.cat([place.float().expand(BATCH, -1, -1) + 1, rest], -1)}

    def _packed(self, key: str, chans: int, patch: int, height: int, width: int) -> Iterator[Feed]:
        name = "image_grid_thw" if "image_grid_thw" in self.names else "grid_thw"
        rows, columns = height // patch, width // patch
        frames = field(self.config, "temporal_patch_size", default=None)
        for time in dict.fromkeys((frames or 1, 1, 2)):
            yield {key: _random(BATCH * rows * columns, chans * time * patch * patch, seed=2),
                   name: torch.tensor([[1, rows, columns]] * BATCH)}  # fmt: skip
        grid = torch.tensor([[1, rows, columns]] * BATCH)
        yield {key: _random(BATCH * rows * columns, chans, patch, patch, seed=2), name: grid}

    def sounds(self) -> Iterator[Feed]:
        """Ways to hand over sound."""
        key = next((k for k in _SOUND_FIELDS if k in self.names), None)
        if key is None:
            return
        mels = self.audio_width()
        frames = 2 * int(field(self.config, "max_source_positions", default=64))
        lengths = dict.fromkeys(v for v in (frames, 128, 64, 3000) if v <= 3000)
        masks = [n for n in self.names if re.fullmatch(_SOUND_MASK, n)]
        wave = _random(BATCH, 3840, seed=3)
        fine = [n for n in masks if n in self.needed or (n == "attention_mask" and "input_ids" not in self.names)] or [
            n for n in masks if n != "attention_mask"
        ]

        def masked(feed: Feed, length: int) -> Iterator[Feed]:
            if fine:
                yield {**feed, **{n: self.mask(length, length // 4) for n in fine}}
                yield {**feed, **{n: self.mask(length, 0) for n in fine}}
                yield {**feed, **{n: self.mask(length, 0).bool() for n in fine}}
            yield feed

        if key == "input_values":
            yield from masked({key: wave}, 3840)
            yield {key: wave[:, None]}
        for length in lengths:
            both = (BATCH, length, mels), (BATCH, mels, length)
            for shape in both if "max_source_positions" not in str(self.config) else both[::-1]:
                yield from masked({key: _random(*shape, seed=3)}, length)
        yield {key: _random(BATCH, 1, 128, mels, seed=3)}
        if key != "input_values":
            yield {key: wave}
            yield {key: wave[:, None]}
        size = field(self.config, "max_length", default=128)
        yield {key: _random(BATCH, int(size), mels, seed=3)}
        for times in (2, 4, int(field(self.config, "num_stacked_frames", default=8))):
            yield from masked({key: _random(BATCH, 64, mels * times, seed=3)}, 64)
