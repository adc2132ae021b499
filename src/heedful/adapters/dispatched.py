"""diffusers' attention backends: kernels that models are told to call in place of torch's attention."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

# those that call `F.scaled_dot_product_attention`
NATIVE = frozenset({"native", "_native_math", "_native_flash", "_native_efficient", "_native_cudnn"})


def other_kernel(model: nn.Module, known: Iterable[str]) -> dict[str, str]:
    """Modules that hand their attention to a kernel that is not torch's, with the reason."""
    dispatch: Any = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None:
        return {}
    served, found = set(known), {}
    everywhere = dispatch._AttentionBackendRegistry.get_active_backend()[0]
    for name, module in model.named_modules():
        processor: Any = getattr(module, "processor", None)
        if name in served or not hasattr(processor, "_attention_backend"):
            continue
        chosen = getattr(processor._attention_backend or everywhere, "value", None)
        if chosen is not None and chosen not in NATIVE:
            found[name] = f"attention backend {chosen!r}; model.set_attention_backend('native')"
    return found
