"""Verbs that explain what a model says of one text, and measure how far an explanation can be trusted."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "attribute": "attribution",
    "faithfulness": "faithful",
    "Faithfulness": "faithful",
    "Removal": "faithful",
    "patching": "activation_patching",
    "path_patching": "activation_patching",
    "HeadEffects": "activation_patching",
}

__all__ = ["Faithfulness", "HeadEffects", "Removal", "attribute", "faithfulness", "patching", "path_patching"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if TYPE_CHECKING:
    from heedful.explaining.activation_patching import HeadEffects, patching, path_patching
    from heedful.explaining.attribution import attribute
    from heedful.explaining.faithful import Faithfulness, Removal, faithfulness
