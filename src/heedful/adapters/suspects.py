"""What the code of a class names, from its forward on: modules compute attention whose class does not speak of it."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

_KERNELS = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})
_SOFTMAX = frozenset({"softmax", "Softmax", "log_softmax", "LogSoftmax"})
_PRODUCTS = frozenset({"matmul", "bmm", "einsum", "baddbmm"})
_FOREIGN = ("torch.", "builtins", "transformers.modeling_", "transformers.utils", "transformers.generation")


def calls_kernel(kind: type) -> bool:
    """Whether a class calls torch's attention."""
    return bool(_KERNELS & _named(kind))


def has_softmax(kind: type) -> bool:
    """Whether a class has a softmax, if need be in a function that it calls."""
    return bool(_SOFTMAX & _named(kind))


def may_attend(kind: type) -> bool:
    """Whether a class has all that attention is written out with."""
    return has_softmax(kind) and bool(_PRODUCTS & _named(kind))


@cache
def _named(kind: type) -> frozenset[str]:
    """What a class's forward names, with what it calls of the class and of other functions of the same authors."""
    own = [vars(base) for base in kind.__mro__ if _of_authors(base.__module__)]
    seen, found = set[CodeType](), set[str]()
    queue = list(_functions(*(home.get(name) for home in own for name in ("__init__", "forward"))))
    while queue:
        function = queue.pop()
        for code in _codes(function.__code__, seen):
            found |= {*code.co_names, *_operators(code)}
            around = function.__globals__
            modules = [x for name in code.co_names if isinstance(x := around.get(name), ModuleType)]
            homes = [*own, around, *(vars(x) for x in modules if _of_authors(x.__name__))]
            queue += _functions(*(home.get(name) for home in homes for name in code.co_names))
    return frozenset(found)


def _functions(*given: Any) -> Iterator[FunctionType]:
    """Those of these that are functions of a model's authors, without what is put around them."""
    for x in given:
        if isinstance(x, FunctionType | staticmethod | classmethod):
            inner: Any = getattr(x, "__func__", x)
            plain = inspect.unwrap(inner)
            if isinstance(plain, FunctionType) and _of_authors(plain.__module__):
                yield plain


def _codes(code: CodeType, seen: set[CodeType]) -> Iterator[CodeType]:
    """A function's code and that of the functions within, each once."""
    if code not in seen:
        seen.add(code)
        yield code
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield from _codes(inner, seen)


def _operators(code: CodeType) -> set[str]:
    several = (one.argrepr for one in dis.get_instructions(code) if one.opname == "BINARY_OP")
    return {"matmul"} if any(x in ("@", "@=") for x in several) else set()


def _of_authors(module: str | None) -> bool:
    return module is not None and not (module == "torch" or module.startswith(_FOREIGN))
