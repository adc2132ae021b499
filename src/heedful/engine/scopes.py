"""Whether a model has the layers and heads that a stack names, and reads what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from heedful.core.errors import Code, FieldError
from heedful.core.method import Scoped, Stack


def require_there(stack: Stack, layers: int, heads_of: Callable[[int], int | None]) -> None:
    """Refuse numbers of no layer and no head; `heads_of` tells a layer's heads, or None where only a call does."""
    for part in stack:
        named = getattr(part, "layers", None)  # as `on` was given them, or as a method's own field names some
        for layer in named if isinstance(named, tuple) else ():
            if isinstance(layer, int) and layer >= layers:
                raise FieldError(f"{part!r}", "layers", layer, f"must be below {layers}, the layers served", layers - 1)
        if isinstance(part, Scoped) and part.heads:
            _require_heads(part, part.heads[-1], {i: heads_of(i) for i in part.layers or range(layers)})


def _require_heads(part: Scoped, highest: int, heads: dict[int, int | None]) -> None:
    """Refuse a head that a layer named with it lacks; where no layer is named, one that no layer has."""
    lacks = {layer: h for layer, h in heads.items() if h is not None and h <= highest}
    if lacks and (part.layers or len(lacks) == len(heads)):
        layer, most = max(lacks.items(), key=lambda found: found[1])
        raise FieldError(f"{part!r}", "heads", highest, f"must be below {most}, the heads of layer {layer}", most - 1)


def require_tokens(model: nn.Module, given: Sequence[Any]) -> None:
    """Refuse a text where a model of transformers reads tokens, and all that a tokenizer gives as one argument."""
    if given and isinstance(given[0], str | Mapping) and hasattr(model, "get_input_embeddings"):
        why = "reads no text" if isinstance(given[0], str) else "takes each by its name: unpack them with **"
        value = given[0] if isinstance(given[0], str) else Code(f"a {type(given[0]).__name__}")
        good = Code("**tokenizer(text, return_tensors='pt')")
        raise FieldError("Run", "inputs", value, f"must be what the model is called with, which {why}", good)
