"""heedful: everything people do to attention in a transformer, as small values that join.

import heedful
from heedful.methods import SinkRate

with heedful.attach(model, SinkRate()) as run:
    run(**tokenizer(text, return_tensors="pt"))
print(run[SinkRate()])
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "ablate": "heedful.explaining.ablation",
    "attach": "heedful.api",
    "attached": "heedful.api",
    "fit": "heedful.api",
    "fold": "heedful.folding",
    "operate": "heedful.api",
    "arrange": "heedful.api",
    "lab": "heedful.laboratory.lab",
    "load": "heedful.saving",
    "decode": "heedful.text_models",
    "diagnose": "heedful.diagnosis.run",
    "compare": "heedful.bench.compare",
    "check": "heedful.conformance",
    "edit": "heedful.plain",
    "explain": "heedful.api",
    "patterns": "heedful.explaining.attention_patterns",
    "Comparison": "heedful.bench.comparison",
    "Profile": "heedful.diagnosis.profile",
    "Run": "heedful.engine.run",
    "Stack": "heedful.core.method",
    "Method": "heedful.core.method",
    "Site": "heedful.core.sites",
    "Prompt": "heedful.core.kinds.tokens",
    "Task": "heedful.tasks.task",
    "HeedfulError": "heedful.core.errors",
}

_MODULES = {
    "authoring": "heedful.authoring",
    "explaining": "heedful.explaining",
    "methods": "heedful.methods",
    "models": "heedful.models",
    "nn": "heedful.nn",
    "tasks": "heedful.tasks",
}

__all__ = sorted([*_HOMES, *_MODULES])  # noqa: PLE0605 - a list; type checkers read __init__.pyi, of `make docs`


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("heedful")
    if name in _MODULES:
        return import_module(_MODULES[name])
    from heedful.core.errors import absent

    raise absent(__name__, name, __all__, "" if name.startswith("_") else _elsewhere(name))


def _elsewhere(name: str) -> str:
    from heedful import explaining, methods

    if name in explaining.__all__:
        return f" There is heedful.explaining.{name}."
    stands = name.lower() in methods.files() and hasattr(methods, name)
    return f" There is heedful.methods.{name}." if stands else ""


def __dir__() -> list[str]:
    return __all__
