"""What methods do, told by their code: what other code under the same name found is nothing of theirs."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from heedful.core.entry import CatalogueEntry
from heedful.core.method import Stack, method_of


def code_of(*given: Any) -> str:
    """A short name for the code of all parts, the files of their classes and the functions that they hold."""
    parts = [part for what in given for part in (what if isinstance(what, Stack) else (what,))]
    told = "\n".join(text for part in parts for text in _entry(method_of(part)))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _entry(entry: CatalogueEntry) -> Iterator[str]:
    for kind in type(entry).__mro__[:-1]:
        if not kind.__module__.startswith(("heedful.core.", "abc")):
            yield _source(kind)
    for held in vars(entry).values():
        if isinstance(held, FunctionType):
            yield from _function(held)
        elif isinstance(held, CatalogueEntry):
            yield from _entry(held)


def _source(kind: type) -> str:
    """The file of a class; of one typed at a prompt or in a notebook, which has none, its functions."""
    try:
        return inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):
        functions = (x for x in vars(kind).values() if isinstance(x, FunctionType))
        return "\n".join(text for function in functions for text in _function(function))


def _function(function: FunctionType) -> Iterator[str]:
    """Its code, and the values that it was given where it was made."""
    yield from _code(function.__code__)
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    for x in (*held, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        if isinstance(x, FunctionType):
            yield from _code(x.__code__)
        else:
            yield _shown(x)


def _code(code: CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names}"
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield from _code(x)
        else:
            yield _shown(x)


def _shown(x: object) -> str:
    """A value as it is in every process: without addresses, and sets in one order."""
    if isinstance(x, set | frozenset):
        return str(sorted(map(_shown, x)))
    return type(x).__name__ if " at 0x" in repr(x) else repr(x)
