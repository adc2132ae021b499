"""Every `torch.nn.MultiheadAttention` of a model, exchanged for heedful's."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from heedful.core.asked import asks
from heedful.core.errors import FieldError
from heedful.core.method import Part, Stack
from heedful.nn.attention import Attention

M = TypeVar("M", bound=nn.Module)


@asks
def convert(model: M, method: Part | Stack | None = None) -> M | Attention:
    """The model with an `Attention` of equal weights, under a method, in place of each `MultiheadAttention` in it.

    It is changed in place, and left as it was where one of them cannot be exchanged.
    """
    torchs = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    found = {module: Attention.from_torch(module, method, i, len(torchs)) for i, module in enumerate(torchs)}
    if not found:
        rule = "has no torch.nn.MultiheadAttention; attach(model, method) serves all that calls torch's attention"
        raise FieldError("convert()", "model", type(model).__name__, rule, "torch.nn.TransformerEncoderLayer(64, 4)")
    for owner in list(model.modules()):
        for name, child in owner.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(owner, name, found[child])
        if isinstance(owner, nn.TransformerEncoder):
            owner.use_nested_tensor = False  # which torch's own modules alone take
    return found[model] if isinstance(model, nn.MultiheadAttention) else model
