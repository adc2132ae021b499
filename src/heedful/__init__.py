"""heedful: everything people do to attention in a transformer, as small values that join.

import heedful
from heedful.methods.observe.sink_rate import SinkRate

with heedful.attach(model, SinkRate()) as run:
    run(**tokenizer(text, return_tensors="pt"))
print(run[SinkRate()])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "attach": "heedful.verbs",
    "fit": "heedful.verbs",
    "fold": "heedful.folding",
    "operate": "heedful.verbs",
    "arrange": "heedful.verbs",
    "decode": "heedful.voices",
    "diagnose": "heedful.diagnosis.run",
    "compare": "heedful.bench.compare",
    "Comparison": "heedful.bench.comparison",
    "Task": "heedful.tasks.task",
    "Item": "heedful.tasks.task",
    "Profile": "heedful.diagnosis.profile",
    "attribute": "heedful.explaining.attribute",
    "faithfulness": "heedful.explaining.faithfulness",
    "Faithfulness": "heedful.explaining.faithfulness",
    "Removal": "heedful.explaining.faithfulness",
    "patching": "heedful.explaining.patching",
    "path_patching": "heedful.explaining.patching",
    "HeadEffects": "heedful.explaining.patching",
    "edit": "heedful.core.plain",
    "explain": "heedful.engine.select",
    "check": "heedful.conformance",
    "find": "heedful.catalogue",
    "Run": "heedful.engine.run",
    "Site": "heedful.core.sites",
    "at": "heedful.core.sites",
    "reads": "heedful.core.sites",
    "sums": "heedful.core.summary",
    "Summary": "heedful.core.summary",
    "Method": "heedful.core.method",
    "Layer": "heedful.core.method",
    "Stack": "heedful.core.stack",
    "Call": "heedful.core.call",
    "Phase": "heedful.core.call",
    "Mask": "heedful.core.mask",
    "Prompt": "heedful.core.kinds",
    "Tokens": "heedful.core.kinds",
    "Decode": "heedful.core.kinds",
    "Surgery": "heedful.core.kinds",
    "Paper": "heedful.core.paper",
    "Fitted": "heedful.core.fitted",
    "HeedfulError": "heedful.core.errors",
}

_MODULES = {"catalogue": "heedful.catalogue", "models": "heedful.models", "stats": "heedful.core.stats"}

__all__ = [
    "Call",
    "Comparison",
    "Decode",
    "Faithfulness",
    "Fitted",
    "HeadEffects",
    "HeedfulError",
    "Item",
    "Layer",
    "Mask",
    "Method",
    "Paper",
    "Phase",
    "Profile",
    "Prompt",
    "Removal",
    "Run",
    "Site",
    "Stack",
    "Summary",
    "Surgery",
    "Task",
    "Tokens",
    "arrange",
    "at",
    "attach",
    "attribute",
    "catalogue",
    "check",
    "compare",
    "decode",
    "diagnose",
    "edit",
    "explain",
    "faithfulness",
    "find",
    "fit",
    "fold",
    "models",
    "operate",
    "patching",
    "path_patching",
    "reads",
    "stats",
    "sums",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("heedful")
    if name in _MODULES:
        return import_module(_MODULES[name])
    raise AttributeError(f"module 'heedful' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from heedful.bench.compare import compare
    from heedful.bench.comparison import Comparison
    from heedful.catalogue import find
    from heedful.conformance import check
    from heedful.core.call import Call, Phase
    from heedful.core.errors import HeedfulError
    from heedful.core.fitted import Fitted
    from heedful.core.kinds import Decode, Prompt, Surgery, Tokens
    from heedful.core.mask import Mask
    from heedful.core.method import Layer, Method
    from heedful.core.paper import Paper
    from heedful.core.plain import edit
    from heedful.core.sites import Site, at, reads
    from heedful.core.stack import Stack
    from heedful.core.summary import Summary, sums
    from heedful.diagnosis.profile import Profile
    from heedful.diagnosis.run import diagnose
    from heedful.engine.run import Run
    from heedful.engine.select import explain
    from heedful.explaining.attribute import attribute
    from heedful.explaining.faithfulness import Faithfulness, Removal, faithfulness
    from heedful.explaining.patching import HeadEffects, patching, path_patching
    from heedful.folding import fold
    from heedful.tasks.task import Item, Task
    from heedful.verbs import arrange, attach, fit, operate
    from heedful.voices import decode
