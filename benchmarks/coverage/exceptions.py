"""What no rule over field names finds out: settings of single model types, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig, ResNetConfig

New = Mapping[str, Any]

# model type -> settings; the reason stands behind each
TABLE: dict[str, Callable[[New], dict[str, Any]]] = {
    "gpt_neo": lambda new: {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},  # one flat list per layer
}


def small_resnet(features: int) -> ResNetConfig:
    """A backbone in place of a timm one, which transformers cannot build without the timm library."""
    widths = [32, 32, 64, 64]
    stages = [f"stage{i}" for i in range(5 - features, 5)]
    return ResNetConfig(embedding_size=32, hidden_sizes=widths, depths=[1, 1, 1, 1], out_features=stages)


def overrides(config: PreTrainedConfig, new: New) -> dict[str, Any]:
    """The settings of this configuration that replace what the rules made of it."""
    found: dict[str, Any] = {}
    backbone = new.get("backbone_config")
    if getattr(backbone, "model_type", "") == "timm_backbone":
        found["backbone_config"] = small_resnet(int(new.get("num_feature_levels", 1) > 1) * 2 + 1)
    own = TABLE.get(config.model_type)
    return found | (own(new) if own else {})
