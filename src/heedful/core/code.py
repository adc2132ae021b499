"""What is made, told by the code that makes it: what other code under the same name made is nothing of its own."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from heedful.core.entry import CatalogueEntry
from heedful.core.method import Stack, method_of


def sources(modules: Iterable[str], followed: tuple[str, ...]) -> list[str]:
    """The files of modules, and of all that these use whose names begin as `followed` says, in the order of names."""
    queue, found = [*modules], dict[str, str]()
    while queue:
        name = queue.pop()
        if name not in found:
            found[name] = file_of(name)
            held = vars(sys.modules[name]).values()
            used = (x.__name__ if isinstance(x, ModuleType) else getattr(x, "__module__", None) for x in held)
            queue += [x for x in used if isinstance(x, str) and x.startswith(followed)]
    return [found[name] for name in sorted(found)]


def file_of(module: str) -> str:
    """A file as it was when it was asked for first; what was typed at a prompt is told by its name alone."""
    return _file_of(sys.modules[module])


@cache
def _file_of(module: ModuleType) -> str:
    """By the module and not its name, since a file of one's own is read again where it was changed."""
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return module.__name__


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
