"""How large an attention layer's queries, keys and values are, before it runs."""

from __future__ import annotations

from torch import nn

from heedful.adapters.around import whatever_is_around
from heedful.adapters.layers import (
    KEY_NAMES,
    OUTPUT_NAMES,
    QUERY_NAMES,
    SHARED,
    VALUE_NAMES,
    columns_of,
    head_width,
    number_told,
    output_projection,
    projections,
    rows_of,
    size_by,
)
from heedful.core.errors import RefusedModel
from heedful.core.method import Layer


def size_of(model: nn.Module, name: str, number: int) -> Layer:
    """A layer's sizes: those of its projections, or as its module tells them where these are fused or factored."""
    try:
        return projections(model, name, number).size
    except RefusedModel:
        layer, place = model.get_submodule(name), output_projection(model, name)
        config = getattr(layer, "config", None) or getattr(model, "config", None)
        heads, width = head_width(layer, config)
        if place is None or not heads:
            q, k, v = (whatever_is_around(layer, names) for names in (QUERY_NAMES, KEY_NAMES, VALUE_NAMES))
            if q is not None and k is not None and v is not None:
                o = whatever_is_around(layer, OUTPUT_NAMES)
                return size_by(f"{name} ({type(layer).__name__})", (heads, width), number, (q, k, v, o), {})
            if (size := _told_by_itself(layer, config, number)) is None:
                raise
            return size
        groups = number_told(layer, ("num_key_value_heads", "num_kv_heads", "kv_heads"))
        if groups is None:
            groups = heads // (number_told(layer, (SHARED,)) or 1)
        value_width, odd = divmod(columns_of(o := getattr(*place)), heads)
        if odd or not groups or heads % groups:
            raise
        return Layer(number, heads, groups, width or value_width, value_width, rows_of(o))


def _told_by_itself(layer: nn.Module, config: object, number: int) -> Layer | None:
    """The sizes of a layer that keeps all of them, the number of query heads to a key head as its attention is told."""
    heads, width = head_width(layer, None)
    shared, stream = number_told(layer, (SHARED,)), number_told(config, ("hidden_size",))
    if not heads or not width or not shared or not stream or heads % shared:
        return None
    return Layer(number, heads, heads // shared, width, width, stream)
