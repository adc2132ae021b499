"""timm and open_clip beside a torch for CPUs.

Both import torchvision, for pictures and a few layers. Its only build on the package index is one for CUDA: beside a
torch for CPUs it cannot be imported, and where it is installed transformers cannot either. The models need none of it,
so the libraries are imported while something stands in its place, which is gone again before anybody else looks.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "torchvision"


class _Kind(type):
    """Has whatever is looked up in it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind(name, (), {})


class _Blank(ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - what makes it a package
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind(name, (), {})


class _Blanks:
    """Finds a blank module under every name that begins with torchvision."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == NAME else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Blank(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None


@contextmanager
def _blank_torchvision() -> Iterator[None]:
    finder: Any = _Blanks()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
            del sys.modules[name]


@cache
def library(name: str) -> Any:
    """timm or open_clip, imported."""
    importlib.import_module("transformers.modeling_utils")  # which looks once for what is installed
    with _blank_torchvision():
        return importlib.import_module(name)


def timm_for_transformers() -> None:
    """Have transformers take timm for installed, as it would be beside a torchvision that nothing here asks for."""
    from transformers import utils
    from transformers.utils import import_utils

    library("timm")
    import_utils.is_timm_available = utils.is_timm_available = lambda: True
    import_utils.BACKENDS_MAPPING["timm"] = (lambda: True, import_utils.BACKENDS_MAPPING["timm"][1])
