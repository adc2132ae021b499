"""Classes of diffusers: how each is made with few layers, and with what it is called.

A class tells what it takes by the names of its arguments and by the sizes in its configuration. Which of several sizes
an argument has is found by trying, on torch's meta device, where that costs little; a class that takes none of what is
tried is told as one that was not built.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import diffusers.models
import torch
from diffusers.models.modeling_utils import LegacyModelMixin, ModelMixin
from torch import nn

from . import library_cases as cases
from .libraries_given import CONFIG, GIVEN
from .libraries_look import UNSEEN

SMALL: Mapping[str, Callable[[], cases.Case]] = {
    "AutoencoderKL": cases.autoencoder, "DiTTransformer2DModel": cases.dit, "FluxTransformer2DModel": cases.flux,
    "PixArtTransformer2DModel": cases.pixart, "SD3Transformer2DModel": cases.sd3,
    "UNet2DConditionModel": cases.unet, "UNet2DModel": cases.unet2d,
}  # fmt: skip
TEXTS, WORDS, TOKENS, SIDE, FRAMES = 2, 7, 16, 32, 5
LAYERS = (
    "num_layers", "num_single_layers", "num_hidden_layers", "n_layers", "depth", "num_mmdit_layers", "mmdit_layers",
    "num_single_dit_layers", "num_refiner_layers", "n_refiner_layers", "num_visual_blocks", "num_text_blocks",
    "num_dual_stream_layers", "num_single_stream_layers", "num_double_layers",
)  # fmt: skip
MISSING: dict[str, Any] = {  # what has no default that a class can be made with
    "in_channels": 4, "patch_size": 2, "sample_size": 16, "cross_attention_dim": 64, "block_out_channels": (32, 64),
    "latent_channels": 4, "out_channels": 3, "spatial_compression_ratio": 2, "layers_per_block": 1, "sample_height": 16,
    "sample_width": 16, "attention_head_dim": 16, "num_attention_heads": 4, "downsample_match_channel": True,
    "upsample_match_channel": True, "scaling_factor": 1.0, "sampling_rate": 16000, "hidden_size": 64,
    "pooled_projection_dim": 64, "ffn_dim_multiplier": 1.0,
}  # fmt: skip
CHANNELS = (
    "in_channels",
    "latent_channels",
    "io_channels",
    "in_dim",
    "latent_channel",
    "input_channels",
    "in_visual_dim",
)
OF_TEXT = (
    "joint_attention_dim", "text_embed_dim", "caption_channels", "encoder_hid_dim", "cross_attention_dim", "text_dim",
    "cap_feat_dim", "context_in_dim", "text_hidden_dim", "embedding_dim", "cross_attention_input_dim", "in_text_dim",
    "cond_token_dim", "encoder_hidden_size", "text_feature_dim", "txt_in_features", "text_states_dim", "hidden_size",
    "encoder_hidden_states_channels", "text_in_dim", "conditioning_dim", "context_dim", "llm_dim", "dim",
)  # fmt: skip
USUAL = (
    "encoder_hidden_states", "timestep", "pooled_projections", "img_ids", "txt_ids", "encoder_attention_mask",
    "encoder_hidden_states_mask", "guidance", "img_shapes", "num_frames", "height", "width",
    "global_hidden_states",
)  # fmt: skip
POOLED = ("pooled_projection_dim", "in_text_dim2", "global_states_input_dim", "global_cond_dim", "cond_embed_dim")


@cache
def classes() -> dict[str, type[Any]]:
    """Every class of a model that diffusers has."""
    found: dict[str, type[Any]] = {}
    for module in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        if "flax" not in module.name:
            kinds = filter(inspect.isclass, vars(importlib.import_module(module.name)).values())
            mine = (kind for kind in kinds if issubclass(kind, ModelMixin) and kind.__module__ == module.name)
            found |= {kind.__name__: kind for kind in mine}
    return {name: kind for name, kind in sorted(found.items()) if kind not in (ModelMixin, LegacyModelMixin)}


def made(name: str, **how: Any) -> cases.Case:
    """A class as it is examined: small where there is a case of it, else with two layers in its own width or `how`."""
    if name in SMALL and not how:
        return SMALL[name]()
    given = _inputs(name, **how)
    model = _model(name, **how)
    return cases.Case(model, partial(_call, model, {key: _tensor(x) for key, x in given.items()}), 0)


def _call(model: nn.Module, given: Mapping[str, Any]) -> Any:
    return model(**given)


def _model(name: str, **how: Any) -> nn.Module:
    kind = classes()[name]
    told = inspect.signature(kind.__init__).parameters
    few = {key: 2 for key in LAYERS if key in told and isinstance(told[key].default, int) and told[key].default > 2}
    few |= CONFIG.get(name, {}) | how
    try:
        return kind(**few).eval()
    except (TypeError, ValueError, IndexError):
        lacking = {k: x for k, x in MISSING.items() if k in told and told[k].default in (None, inspect.Parameter.empty)}
        return kind(**{**lacking, **few}).eval()


@cache
def _inputs(name: str, **how: Any) -> dict[str, Any]:
    """Shapes and kinds of the arguments that the class takes, the first that it does."""
    with torch.device("meta"):
        model, why = _model(name, **how), "takes no argument that is known here"
        for given in _tries(model):
            try:
                with torch.no_grad():
                    model(**{key: _tensor(x) for key, x in given.items()})
            except Exception as error:  # noqa: BLE001 - it takes another
                if any(x in str(error).lower() for x in UNSEEN):  # it asks what is in a tensor: sizes are right so far
                    return given
                why = f"{type(error).__name__}: {str(error)[:100]}"
            else:
                return given
    raise ValueError(why)


def _tensor(told: Any) -> Any:
    """What an argument is: numbers drawn, an order, one number (or yes, or no) all over; or as it was told."""
    if isinstance(told, list):
        return [_tensor(x) for x in told]
    match told:
        case ("drawn", *shape):
            x = torch.empty(shape)
            return x if x.is_meta else cases.draw(*shape)
        case ("order", count):
            return torch.arange(count)
        case ("filled", value, *shape):
            return torch.full(shape, value)
    return told


def _tries(model: nn.Module) -> Iterator[dict[str, Any]]:
    told = inspect.signature(model.forward).parameters
    config: Mapping[str, Any] = dict(model.config)  # type: ignore[arg-type]

    def sizes(names: tuple[str, ...]) -> list[int]:
        found = [x[0] if isinstance(x, (tuple, list)) and x else x for x in (config.get(key) for key in names)]
        return list(dict.fromkeys(x for x in found if isinstance(x, int) and x > 0))

    first = next(key for key in told if key != "self")
    channels = sizes(CHANNELS) or [3]
    streams: list[tuple[Any, ...]] = []
    for c in channels:
        streams += [(TEXTS, c, SIDE, SIDE), (TEXTS, c, FRAMES, SIDE, SIDE), (TEXTS, TOKENS, c), (TEXTS, c, 64)]
        streams += [(TEXTS, FRAMES, c, SIDE, SIDE), (TEXTS, FRAMES, SIDE, SIDE, c)]
    words: list[Any] = [("drawn", TEXTS, WORDS, d) for d in sizes(OF_TEXT)] or [None]
    pooled: list[Any] = [("drawn", TEXTS, d) for d in sizes(POOLED)] or [None]
    for stream, text, whole, ids in itertools.product(streams, words, (False, True), (3, 4)):
        packed = len(stream) == 3
        if ids == 4 and not (packed and "img_ids" in told):
            continue
        if whole and not any("timestep" in key for key in told):
            continue
        time = ("filled", 1 if whole else 1.0, TEXTS)
        mask, side = ("filled", 1, TEXTS, WORDS), ("filled", 1.0, TEXTS, 2)
        offers: dict[str, Any] = {
            first: ("drawn", *stream), "encoder_hidden_states": text, "timestep": time, "t": time, "timesteps": time,
            "pooled_projections": pooled[0],
            "global_hidden_states": ("drawn", TEXTS, 1, *pooled[0][2:]) if pooled[0] else None,
            "img_ids": ("filled", 0.0, TOKENS, ids), "txt_ids": ("filled", 0.0, WORDS, ids),
            "encoder_attention_mask": mask, "encoder_hidden_states_mask": mask, "attention_mask": mask,
            "guidance": ("filled", 1.0, TEXTS),
            "original_size": side, "target_size": side, "crop_coords": side,
            "timestep_r": time, "r_timestep": time, "img_shapes": [(1, 4, 4)] * TEXTS, "num_frames": 1,
            "height": 4, "width": 4,
            "controlnet_cond": ("drawn", TEXTS, 3, 8 * SIDE, 8 * SIDE), "conditioning_scale": 1.0,
            "timestep_ratio": ("filled", 1.0, TEXTS), "fps": ("filled", 1.0, TEXTS),
            "added_time_ids": ("filled", 1.0, TEXTS, 3),
            "visual_rope_pos": [("order", n) for n in (FRAMES, SIDE // 2, SIDE // 2)],
            "text_rope_pos": ("order", WORDS),
        }  # fmt: skip
        needed = {key for key, x in told.items() if x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD}
        usual = {*USUAL}
        if not packed:
            usual -= {"img_ids", "txt_ids", "num_frames", "height", "width", "img_shapes"}
        chosen = {key: offers[key] for key in told if key in needed | usual and offers.get(key) is not None}
        chosen |= GIVEN.get(type(model).__name__, {})
        chosen = {key: x for key, x in chosen.items() if x is not None}
        yield chosen
        if "guidance" in chosen and "guidance" not in needed:
            yield {key: x for key, x in chosen.items() if key != "guidance"}


def makers() -> dict[str, Callable[..., cases.Case]]:
    return {name: partial(made, name) for name in classes()}
