"""An attention layer's projections, and how large its queries, keys and values are before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from heedful.adapters.around import gives_alone, linear_in, whatever_is_around
from heedful.adapters.layers import own_source, uses_interface
from heedful.core.entry import Layer
from heedful.core.errors import RefusedModel

QUERY_NAMES = ("q_proj", "query", "q_lin", "wq", "q", "query_proj", "to_q", "linear_q")
KEY_NAMES = ("k_proj", "key", "k_lin", "wk", "k", "key_proj", "to_k", "linear_k")
VALUE_NAMES = ("v_proj", "value", "v_lin", "wv", "v", "value_proj", "to_v", "linear_v")
OUTPUT_NAMES = (
    "o_proj", "out_proj", "out_lin", "wo", "o", "dense", "proj", "c_proj", "projection", "to_out", "Wo",
    "projection_layer", "out", "linear_out", "output", "output_projection",
)  # fmt: skip
# children that map to queries, keys and values one after another, and what says so in the class; others mix them
FUSED = {"c_attn": ".split(self.split_size, dim=2)", "qkv_proj": "qkv[..., :query_pos]"}
OUTPUT_OF_PARENT = ("output.dense", "attention_output.dense", "out_proj", "o_proj")
WIDTHS = ("qk_head_dim", "head_dim", "attention_head_size", "d_head", "key_value_proj_dim", "dim_per_head")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
SHARED = "num_key_value_groups"  # what modules call the number of query heads to a key head


@dataclass(frozen=True, eq=False)
class Projections:
    """The four linear maps of an attention layer, as modules, with the modules that own them.

    Where one module maps to queries, keys and values it stands for each of the three, and `rows` tells whose are which.
    """

    q: tuple[nn.Module, str]
    k: tuple[nn.Module, str]
    v: tuple[nn.Module, str]
    o: tuple[nn.Module, str]
    size: Layer
    rows: Mapping[str, slice] = field(default_factory=dict)  # of a fused map's outputs, by letter

    def module(self, letter: str) -> nn.Module:
        owner, name = getattr(self, letter)
        return getattr(owner, name)

    def own(self, letter: str, x: Tensor) -> Tensor:
        """What is the letter's own of something `[out ...]` of its module; a view."""
        return x[self.rows[letter]] if letter in self.rows else x


def _child(owner: nn.Module, names: Iterable[str]) -> tuple[nn.Module, str] | None:
    children = dict(owner.named_children())
    for name in names:
        if name in children:
            found = children[name]
            if isinstance(found, nn.Sequential | nn.ModuleList) and len(found):
                first, module = next(found.named_children())
                if getattr(getattr(module, "weight", None), "ndim", 0) == 2:
                    return found, first
            if isinstance(getattr(found, "weight", None), nn.Parameter) and found.weight.ndim == 2:
                return owner, name
            if (inner := gives_alone(found)) is not None:
                return found, inner
    return None


def output_projection(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The module that maps heads to the residual stream: a child of the layer, or its sibling as in BERT."""
    layer = model.get_submodule(name)
    if found := _child(layer, OUTPUT_NAMES):
        return found
    parent_name = name.rpartition(".")[0]
    if not parent_name:
        return None
    parent = model.get_submodule(parent_name)
    for path in OUTPUT_OF_PARENT:
        head, _, leaf = path.rpartition(".")
        owner = dict(parent.named_modules()).get(head) if head else parent
        if owner is not None and (found := _child(owner, (leaf,))):
            return found
    return None


def output_module(model: nn.Module, name: str) -> nn.Module | None:
    """What gives a layer's part of the residual stream: its output projection, whatever is built around that."""
    if found := output_projection(model, name):
        owner, child = found
        return owner.get_submodule(child)
    children = dict(model.get_submodule(name).named_children())
    return next((children[x] for x in OUTPUT_NAMES if x in children), None)


def head_width(layer: nn.Module, config: object) -> tuple[int | None, int | None]:
    """Number of query heads and head width as the module or its config states them."""
    heads = width = None
    for owner in (layer, config):  # a config is asked for what the module does not say, and may refuse to answer
        heads = heads_told(owner) if heads is None else heads
        width = number_told(owner, WIDTHS) if width is None else width
    return heads, width


def heads_told(owner: object) -> int | None:
    """The number of query heads as a module or a config tells it."""
    return number_told(owner, HEADS)


def number_told(owner: object, names: Iterable[str]) -> int | None:
    """The first of these attributes that is a number."""
    return next((x for name in names if isinstance(x := getattr(owner, name, None), int)), None)


def projections(model: nn.Module, name: str, number: int) -> Projections:
    """The projections of a layer, or RefusedModel with the reason."""
    layer = model.get_submodule(name)
    if not uses_interface(type(layer)):
        raise RefusedModel(
            f"{name} ({type(layer).__name__}) computes attention by itself, so that it is not known what its weights "
            "come to"
        )
    positions = {
        "query": _child(layer, QUERY_NAMES),
        "key": _child(layer, KEY_NAMES),
        "value": _child(layer, VALUE_NAMES),
        "output": output_projection(model, name),
    }
    config = getattr(layer, "config", None) or getattr(model, "config", None)
    rows: dict[str, slice] = {}
    if (fused := _fused(layer, config)) is not None:
        place, rows = fused
        positions |= dict.fromkeys(("query", "key", "value"), place)
    found = [place for place in positions.values() if place is not None]
    if missing := [word for word, place in positions.items() if place is None]:
        have = ", ".join(n for n, _ in layer.named_children()) or "none"
        known = (*QUERY_NAMES, *KEY_NAMES, *VALUE_NAMES, *OUTPUT_NAMES)
        if packed := [n for n, x in layer.named_children() if n in known and callable(getattr(x, "weight", None))]:
            kind = type(getattr(layer, packed[0]))
            raise RefusedModel(
                f"{name}.{packed[0]} ({kind.__module__}.{kind.__name__}) packs its weight, which cannot be read; load "
                "the model without quantisation"
            )
        unread = [n for n, _ in layer.named_children() if n in known and _child(layer, (n,)) is None]
        if around := [n for n in unread if linear_in(getattr(layer, n)) is not None]:
            raise RefusedModel(
                f"{name}.{around[0]} ({type(getattr(layer, around[0])).__name__}) does more than the linear map in it, "
                "such as clipping, so that its weight does not tell what it gives"
            )
        raise RefusedModel(
            f"{name} ({type(layer).__name__}) has no separate {', '.join(missing)} projection that heedful knows; its "
            f"children are: {have}"
        )
    q, k, v, o = (getattr(*place) for place in found)
    size = size_by(f"{name} ({type(layer).__name__})", head_width(layer, config), number, (q, k, v, o), rows)
    return Projections(found[0], found[1], found[2], found[3], size, rows)


def size_by(
    what: str, told: tuple[int | None, int | None], number: int, maps: Sequence[nn.Module | None],
    rows: Mapping[str, slice],
) -> Layer:  # fmt: skip
    """The sizes that a layer's linear maps have, for the number and width of heads as it is told."""
    (heads, width), (q, k, v, o) = told, maps
    q_rows, k_rows, v_rows = rows_of(q), rows_of(k), rows_of(v)
    if rows:
        q_rows, k_rows, v_rows = (rows[letter].stop - rows[letter].start for letter in "qkv")
    if width is None and heads:
        width = q_rows // heads
    if not width or q_rows % width or k_rows % width:
        raise RefusedModel(f"{what} does not tell its head width")
    o_cols = (heads or 0) * width if o is None else columns_of(o)
    heads, kv_heads = q_rows // width, k_rows // width
    if v_rows % kv_heads or o_cols % heads or heads % kv_heads:
        raise RefusedModel(f"{what}: its projections do not divide into {heads} heads")
    if o_cols != heads * (value_width := v_rows // kv_heads):
        raise RefusedModel(
            f"{what}: its query projection has rows for {heads} heads, and its output projection takes "
            f"{o_cols // value_width} of the values' width: it gives more than queries, such as gates, or there are "
            "not as many heads of values as of keys"
        )
    return Layer(number, heads, kv_heads, width, value_width, columns_of(q))


def _fused(layer: nn.Module, config: object) -> tuple[tuple[nn.Module, str], dict[str, slice]] | None:
    """The child that maps to queries, keys and values, if it is known how, and the rows of each."""
    kind: Any = type(layer)
    place, (heads, width) = _child(layer, FUSED), head_width(layer, config)
    if place is None or FUSED[place[1]] not in own_source(kind) or not heads or not width:
        return None
    groups = getattr(config, "num_key_value_heads", None) or heads
    q, k, v = (width * count for count in (heads, heads + groups, heads + 2 * groups))
    if rows_of(getattr(*place)) != v:  # one of cross-attention makes no queries
        return None
    return place, {"q": slice(0, q), "k": slice(q, k), "v": slice(k, v)}


def rows_of(linear: Any) -> int:
    """What a linear map gives; a packed weight does not have its shape."""
    told = getattr(linear, "out_features", None)
    return told if isinstance(told, int) else int(linear.weight.shape[1 if transposed(linear) else 0])


def columns_of(linear: Any) -> int:
    told = getattr(linear, "in_features", None)
    return told if isinstance(told, int) else int(linear.weight.shape[0 if transposed(linear) else 1])


def transposed(linear: nn.Module) -> bool:
    return type(linear).__name__ == "Conv1D"


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
