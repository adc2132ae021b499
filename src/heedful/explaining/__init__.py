"""Verbs that explain what a model says of one text, and measure how far an explanation can be trusted."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Ability": "dissociating",
    "activations": "site_values",
    "agreement": "agreeing",
    "Agreement": "agreeing",
    "attribute": "attribution",
    "Attribution": "attribution",
    "inflection": "inflecting",
    "Inflection": "inflecting",
    "likeness": "likening",
    "Likeness": "likening",
    "linearity": "linear",
    "Linearity": "linear",
    "logit_lens": "logits",
    "Lens": "logits",
    "depth_use": "depth",
    "DepthUse": "depth",
    "direct_logits": "logits",
    "DirectLogits": "logits",
    "dissociate": "dissociating",
    "Dissociation": "dissociating",
    "patterns": "attention_patterns",
    "Patterns": "attention_patterns",
    "ablate": "ablation",
    "head_importance": "importance",
    "HeadImportance": "importance",
    "faithfulness": "faithful",
    "Faithfulness": "faithful",
    "ReAGent": "replacing",
    "Removal": "faithful",
    "patching": "activation_patching",
    "path_patching": "activation_patching",
    "HeadEffects": "activation_patching",
    "spans": "spanning",
    "Spans": "spanning",
    "trace": "tracing",
    "Trace": "tracing",
    "word_maps": "picturing",
    "WordMap": "picturing",
    "WordMaps": "picturing",
    "weight_gradients": "gradients",
    "WeightGradients": "gradients",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605 - a list; type checkers read __init__.pyi, of `make docs`


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    from heedful.core.errors import absent

    raise absent(__name__, name, __all__)
