"""Shrink a configuration by rules over the names of its fields.

Widths become 64, feed-forwards 128, heads 4 with 2 key-value heads, vocabularies 160, images 64 pixels, and
the layers the fewest that still show every kind of layer. `PLANS` lists milder plans for configurations whose
sizes depend on one another in ways no rule knows.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from .exceptions import overrides
from .rules import (
    DEPTH,
    DEPTH_LIST,
    FILL,
    HEADS_LIST,
    IMAGE,
    IMAGES,
    LAYER_INDEX,
    TEXT,
    TOKEN_ID,
    TOKENS,
    VOCAB,
    WIDTH,
    WIDTH_LIST,
    Plan,
    limit,
)

MOST_LAYERS = 6


class Ids:
    """Hands out distinct ids above ordinary text for special tokens that no longer fit the vocabulary."""

    def __init__(self) -> None:
        self._new: dict[int, int] = {}

    def __call__(self, old: int) -> int:
        if old < VOCAB:
            return old
        return self._new.setdefault(old, TEXT + len(self._new) % (VOCAB - TEXT))


def _ints(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(v) is int for v in value)


def shrunk(config: PreTrainedConfig, plan: Plan, ids: Ids | None = None) -> dict[str, Any]:
    """Keyword arguments for `type(config)` that describe a small model of the same kind."""
    ids = ids or Ids()
    own = vars(config)
    if "kv_lora_rank" in own and plan.widths:
        plan = dataclasses.replace(plan, kv=plan.heads)
    plain: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    for name, default in _declared(type(config)).items():
        value = own.get(name, default)
        if isinstance(value, PreTrainedConfig):
            nested[name] = type(value)(**shrunk(value, plan, ids))
        elif value is None and name in FILL and plan.widths:
            bound = FILL[name]
            plain[name] = getattr(plan, bound) if isinstance(bound, str) else bound
        elif value is not None and (default is not None or _kept_when_derived(name, value)):
            plain[name] = value
    layers = own.get("num_hidden_layers")
    rows, depth = _rows(layers, plain)
    counted = depth if type(layers) is int else None
    new = {name: _small(name, value, plan, ids, counted) for name, value in plain.items()}
    new.update(rows)
    if "num_hidden_layers" in new:
        new["num_hidden_layers"] = depth
    if plan.widths:
        _relations(type(config), own, new, plan)
    _stages(new, "num_hidden_layers" in new)
    new.update(nested)
    new.update(overrides(config, new))
    return new


def _declared(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields a config class declares itself, with their class defaults."""
    common = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    found = {}
    for field in dataclasses.fields(kind):
        if field.name not in common and field.init:
            factory = field.default_factory
            found[field.name] = field.default if factory is dataclasses.MISSING else factory()
    return found


def _kept_when_derived(name: str, value: Any) -> bool:
    """Whether a value that the class derived is stated all the same: it would not follow from smaller sizes."""
    if re.fullmatch(TOKEN_ID, name) or re.fullmatch(IMAGES[0][0], name) or "pinpoints" in name:
        return True
    if name == "num_key_value_heads":
        return True
    return isinstance(value, (list, tuple)) and bool(value)


def _rows(depth: Any, values: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Per-layer lists cut to the fewest layers, two at least, that keep each distinct combination."""
    if type(depth) is not int:
        return {}, 2
    lists = {k: v for k, v in values.items() if isinstance(v, (list, tuple)) and len(v) == depth and depth > 2}
    kinds = {k: v for k, v in lists.items() if all(isinstance(e, (str, bool, int)) for e in v) and len(set(v)) < 5}
    keep: list[int] = []
    for layer in range(depth):
        row = tuple(v[layer] for v in kinds.values())
        if kinds and len(keep) < MOST_LAYERS and row not in [tuple(v[k] for v in kinds.values()) for k in keep]:
            keep.append(layer)
    keep += [layer for layer in range(depth) if layer not in keep][: max(0, 2 - len(keep))]
    keep.sort()
    rows = {k: type(v)(v[i] for i in keep) for k, v in lists.items()}
    patterns = [
        v for k, v in values.items()
        if k not in lists and isinstance(v, (list, tuple)) and len(v) < depth and len(set(map(str, v))) > 1
        and all(isinstance(e, str) for e in v) and re.fullmatch(r".*(types?|pattern|kinds)", k)
    ]  # fmt: skip
    needed = max((1 + max(v.index(e) for e in set(v)) for v in patterns), default=0)
    indices = [v for k, v in values.items() if _ints(v) and re.fullmatch(r".*out_indices", k)]
    needed = max([needed, *(len(v) for v in indices)])
    return rows, max(len(keep), min(needed, MOST_LAYERS))


def _small(name: str, old: Any, plan: Plan, ids: Ids, depth: int | None) -> Any:
    """One field's new value."""
    if re.fullmatch(TOKEN_ID, name):
        if type(old) is int:
            return ids(old)
        return type(old)(ids(v) for v in old) if _ints(old) else old
    if re.fullmatch(LAYER_INDEX, name) and (type(old) is int or _ints(old)):
        return _index(old, depth or 2)
    tables = DEPTH + TOKENS + (IMAGES if plan.images else []) + (WIDTH if plan.widths else [])
    bound = limit(tables, name, plan)
    if _ints(old):
        return _list(name, old, plan, bound, depth)
    if plan.images and "pinpoints" in name and isinstance(old, (list, tuple)) and old:
        base = min(min(pair) for pair in old)
        return [[side * IMAGE // base for side in pair] for pair in old if max(pair) <= 2 * base]
    if plan.images and isinstance(old, dict) and set(old) == {"height", "width"}:
        return dict.fromkeys(old, IMAGE)
    if type(old) in (int, float) and bound is not None and old > 0:
        return type(old)(min(old, bound))
    return old


def _index(old: Any, depth: int) -> Any:
    """Layer numbers that the fewer layers have."""
    if type(old) is int:
        return min(old, depth - 1) if old >= 0 else max(old, -depth)
    if min(old) < 0:
        return type(old)(sorted({max(v, -depth) for v in old}))
    return type(old)(sorted({min(v, depth - 1) for v in old}))


def _list(name: str, old: Any, plan: Plan, bound: int | None, depth: int | None) -> Any:
    """Lists of widths keep their proportions, lists of depths their length, sizes of images their shape."""
    kind = type(old)
    if name == "backbone_out_indices" and depth is not None:
        return kind(range(depth - len(old), depth))
    if re.fullmatch(r".*out_indices", name):
        return old if depth is None or max(old) <= depth else kind(range(depth - len(old) + 1, depth + 1))
    if re.fullmatch(DEPTH_LIST, name):
        return kind(min(v, 2) for v in old)
    if plan.widths and re.fullmatch(HEADS_LIST, name):
        return kind(max(1, v * 2 // 3) for v in old) if old[0] == 3 else old
    if plan.widths and re.fullmatch(WIDTH_LIST, name) and min(old) > 32 and not name.startswith(("patch", "image")):
        return kind(max(8, v * 32 // min(old) // 8 * 8) for v in old)
    if bound is not None and len(old) <= 3 and re.fullmatch(r".*(image|img|input|patch|crop|window|vocab).*", name):
        return kind(max(1, v * bound // min(old)) if min(old) > bound else min(v, bound) for v in old)
    if bound is not None and re.fullmatch(r".*attention_window", name):
        return kind([bound] * (depth or 2))
    return old


def _stages(new: dict[str, Any], by_layer: bool) -> None:
    """Backbones keep their chosen outputs under private names, but take them under public ones."""
    features, indices = new.pop("_out_features", None), new.pop("_out_indices", None)
    if by_layer and indices:
        new["out_indices"] = list(indices)
    elif features:
        new["out_features"] = list(features)


def _relations(kind: type[PreTrainedConfig], own: Mapping[str, Any], new: dict[str, Any], plan: Plan) -> None:
    """Sizes that must agree with other sizes."""
    if "spatial_merge_size" in new and "window_size" in new:
        new["window_size"] = 2 * new["spatial_merge_size"] * new.get("patch_size", 8)
    if "expand" in new and "head_dim" in new and "state_size" in new:
        new["head_dim"] = int(new["expand"] * new.get("hidden_size", plan.width)) // new.get("num_heads", plan.heads)
    if "mamba_expand" in new and "mamba_n_heads" in new:
        new["mamba_d_head"] = int(new["mamba_expand"] * plan.width) // new["mamba_n_heads"]
    if "patch_embed_hidden_size" in new:
        new["patch_embed_hidden_size"] = 3 * new.get("patch_size", 8) ** 2
    if any("sliding" in str(layer) for layer in new.get("layer_types") or ()) and not new.get("sliding_window"):
        new["sliding_window"] = 8
    rope = own.get("rope_parameters")
    old = (rope.get("mrope_section") or _default_section(kind)) if isinstance(rope, dict) else None
    if isinstance(rope, dict) and old and "num_attention_heads" in own:
        head = new.get("head_dim") or new.get("hidden_size", plan.width) // new.get("num_attention_heads", plan.heads)
        total = int(head * (rope.get("partial_rotary_factor") or 1.0)) // 2
        section = [max(1, v * total // sum(old)) for v in old]
        section[0] += total - sum(section)
        new["rope_parameters"] = {**rope, "mrope_section": section}


def _default_section(kind: type[PreTrainedConfig]) -> list[int] | None:
    """The rotary sections that the modelling code falls back to, where it names some."""
    try:
        module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
    except ImportError:
        return None
    found = re.search(r'"mrope_section", \[([\d, ]+)\]', inspect.getsource(module))
    return [int(v) for v in found.group(1).split(",")] if found else None
