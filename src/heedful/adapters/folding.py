"""What stands between an attention edit and a layer's weights, and a config that tells of heads that went."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from heedful.adapters.biases import shapes
from heedful.adapters.projections import Projections
from heedful.core.entry import Layer
from heedful.core.sites import Site

PROJECTED = frozenset({Site.QUERY, Site.KEY})
MIXED = frozenset({Site.HIDDEN, Site.VALUE, Site.PATTERN, Site.HEAD_OUTPUT})
OF_SCORES = ("relative_", "sinks")  # names of things that meet the scores alone
OF_THE_MAP = ("q_", "k_", "query", "key", *OF_SCORES)  # and of those that only the map depends on


def obstacle(model: nn.Module, name: str, p: Projections, site: Site) -> str | None:
    """Why nothing that acts at the site can be written into the layer's projections; None where something can."""
    if site is Site.RESIDUAL:
        return None
    layer, shared = model.get_submodule(name), _shared(model)
    for letter in "qkvo":
        linear: Any = p.module(letter)
        if id(linear.weight) in shared:
            return f"the weight of its {letter} projection serves in another place too"
    if site is Site.OUTPUT:
        return None
    beside = _beside(layer, p)
    config = getattr(layer, "config", None) or getattr(model, "config", None)
    if site in MIXED:
        beside = [x for x in beside if not x.startswith(OF_THE_MAP)]
        return f"{beside[0]} stands between the two" if beside else None
    if site in PROJECTED:
        beside = [x for x in beside if not x.startswith(OF_SCORES)]
        return _bent(layer, config, beside, "clip_qkv")
    if site is Site.SCORES:
        biased = "position_bias" in inspect.signature(layer.forward).parameters or getattr(config, "alibi", False)
        if biased and not beside:
            return "a position bias is added to the scores"
        return _bent(layer, config, beside, "clip_qkv", "softcap")
    return f"no projection leads to or from {site.name}"


def _bent(layer: nn.Module, config: object, beside: list[str], *marks: str) -> str | None:
    """What a model does to queries, keys or scores beside multiplying them, so that a factor is no longer one."""
    if beside:
        return f"{beside[0]} acts on queries, keys or scores behind the projections"
    found: Mapping[str, Any] = {**(vars(config) if config else {}), **vars(layer)}
    for name, value in found.items():
        if value and any(mark in name for mark in marks) and not name.startswith("final"):
            return f"{name} = {value} bends queries, keys or scores"
    return None


def _beside(layer: nn.Module, p: Projections) -> list[str]:
    """What a layer holds that is none of its projections and does something."""
    ours = {id(p.module(letter)) for letter in "qkvo"}
    parts = [
        name
        for name, part in layer.named_modules()
        if part is not layer
        and id(part) not in ours
        and not any(part.children())
        and not isinstance(part, nn.Dropout | nn.Identity)
        and "rotary" not in name
    ]
    return [*parts, *(name for name, _ in layer.named_parameters(recurse=False))]


def _shared(model: nn.Module) -> set[int]:
    """The identities of parameters that several modules hold."""
    counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {key for key, count in counts.items() if count > 1}


def renew_config(model: Any, sizes: Mapping[str, Layer]) -> str | None:
    """Make configs tell the head counts of the layers that hold them; why that is not possible, if it is not."""
    by_config: dict[int, tuple[Any, set[tuple[int, int, int]]]] = {}
    for name, size in sizes.items():
        config = getattr(model.get_submodule(name), "config", None) or model.config
        by_config.setdefault(id(config), (config, set()))[1].add((size.heads, size.kv_heads, size.head_dim))
    for _, counts in by_config.values():
        if len(counts) > 1:
            kept = sorted(groups for _, groups, _ in counts)
            return f"its layers keep {kept[0]} to {kept[-1]} key heads, and its config has one count for all of them"
    before = [(config, dict(vars(config))) for config, _ in by_config.values()]
    try:
        for config, ((heads, groups, width),) in by_config.values():
            config.num_attention_heads, config.head_dim = heads, width
            if hasattr(config, "num_key_value_heads"):
                config.num_key_value_heads = groups
        with torch.device("meta"):
            if shapes(type(model)(model.config)) == shapes(model):
                return None
    except (AttributeError, ValueError):  # a fixed head width, or heads that do not divide the width
        pass
    for config, fields in before:
        vars(config).clear()
        vars(config).update(fields)
    return "its config has no way to tell heads of another width than all heads together, over their number"
