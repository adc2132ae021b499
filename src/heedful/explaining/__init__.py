"""Verbs that explain what a model says of one text, and measure how far an explanation can be trusted."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    "head_importance": "ablation",
    "HeadImportance": "ablation",
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

__all__ = [
    "Ability",
    "Agreement",
    "Attribution",
    "DepthUse",
    "DirectLogits",
    "Dissociation",
    "Faithfulness",
    "HeadEffects",
    "HeadImportance",
    "Inflection",
    "Lens",
    "Likeness",
    "Linearity",
    "Patterns",
    "ReAGent",
    "Removal",
    "Spans",
    "Trace",
    "WeightGradients",
    "WordMap",
    "WordMaps",
    "ablate",
    "activations",
    "agreement",
    "attribute",
    "depth_use",
    "direct_logits",
    "dissociate",
    "faithfulness",
    "head_importance",
    "inflection",
    "likeness",
    "linearity",
    "logit_lens",
    "patching",
    "path_patching",
    "patterns",
    "spans",
    "trace",
    "weight_gradients",
    "word_maps",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    from heedful.core.errors import absent

    raise absent(__name__, name, __all__)


if TYPE_CHECKING:
    from heedful.explaining.ablation import HeadImportance, ablate, head_importance
    from heedful.explaining.activation_patching import HeadEffects, patching, path_patching
    from heedful.explaining.agreeing import Agreement, agreement
    from heedful.explaining.attention_patterns import Patterns, patterns
    from heedful.explaining.attribution import Attribution, attribute
    from heedful.explaining.depth import DepthUse, depth_use
    from heedful.explaining.dissociating import Ability, Dissociation, dissociate
    from heedful.explaining.faithful import Faithfulness, Removal, faithfulness
    from heedful.explaining.gradients import WeightGradients, weight_gradients
    from heedful.explaining.inflecting import Inflection, inflection
    from heedful.explaining.likening import Likeness, likeness
    from heedful.explaining.linear import Linearity, linearity
    from heedful.explaining.logits import DirectLogits, Lens, direct_logits, logit_lens
    from heedful.explaining.picturing import WordMap, WordMaps, word_maps
    from heedful.explaining.replacing import ReAGent
    from heedful.explaining.site_values import activations
    from heedful.explaining.spanning import Spans, spans
    from heedful.explaining.tracing import Trace, trace
