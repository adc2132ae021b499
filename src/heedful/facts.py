"""What a result must say beside its numbers: which model, on which machine, with which versions."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heedful.core.figures import counted
from heedful.core.fitted import WHOLE, Fitted


def facts_of(model: Any, name: str, layers: int) -> dict[str, Any]:
    """What is true of a model and stays so."""
    from heedful.adapters.spread import parameters_of
    from heedful.models.copies import copied

    config = text_config(model)
    heads = _most(getattr(config, "num_attention_heads", 0))
    weights = [p for _, own in parameters_of(model) for p in own.values()]
    origin = getattr(getattr(model, "config", None), "_name_or_path", "")
    return {
        "model": name or (origin and copied(Path(origin))) or type(model).__name__,
        "kind": type(model).__name__,
        "weights": fingerprint(model),
        "layers": layers,
        "heads": heads,
        "kv_heads": _most(getattr(config, "num_key_value_heads", 0)) or heads,
        "width": getattr(config, "hidden_size", None),
        "parameters": sum(p.numel() for p in weights),
        "dtype": str(weights[0].dtype).removeprefix("torch."),
    }


def text_config(model: Any) -> Any:
    """The settings of a model's text half, or of the whole; None where it keeps none, as one of plain torch."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def fingerprint(model: Any) -> str:
    """A short name for a model's weights, from the first few numbers of each and the sums of its rows.

    Numbers are added up by their bits, so that one that differs is seen and no order of summation is.
    """
    from heedful.adapters.spread import weights_of

    told: dict[str, Tensor] = {}
    for i, weight in enumerate(weights_of(model)):
        told[f"{i:06d}"] = weight.flatten()[:16].cpu()
        if weight.numel():
            rows = (weight.flatten(0, -2) if weight.ndim > 1 else weight.reshape(1, -1)).contiguous()
            each = rows.element_size()
            by_eight = not (rows.shape[1] * each % 8 or rows.storage_offset() * each % 8)  # which are added fastest
            told[f"{i:06d} rows"] = rows.view(WHOLE[8 if by_eight else each]).sum(-1, dtype=torch.long).cpu()
    return Fitted(told).digest[:16]


def surroundings(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the hour."""
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": f"{named} ({counted(torch.get_num_threads(), 'thread')})",
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("heedful", "torch", "transformers")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The name of the machine's processor."""
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.is_file() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def _most(count: Any) -> int:
    """A number of heads; some configs list one for each layer."""
    return max(count) if isinstance(count, list | tuple) else int(count or 0)
