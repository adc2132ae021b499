"""How a layer rotates its queries and keys, read off its class: as the model's own file does it, or refused."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from textwrap import dedent
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.adapters.bound import Bound
from heedful.adapters.layers import own_source, source_of
from heedful.core.errors import RefusedModel

ROTARY = "position_embeddings"  # what a module takes its rotary embedding by


class _Turn(NamedTuple):
    """One place of a forward where something is rotated."""

    tests: tuple[str, ...]  # what must be true of the module for it to come there
    function: Callable[..., Any] | None  # (q, k, cos, sin) to both; None where it is of another form


@dataclass(frozen=True, eq=False)
class _Rotation:
    """A layer's own; equal to that of another layer that was handed the same angles."""

    function: Callable[..., Any]
    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        if self.cos.ndim == 3:  # [b n d]; some functions join what they turn of a head with the rest of it
            x = x.expand(torch.broadcast_shapes(x.shape, (len(self.cos), 1, self.cos.shape[1], 1)))
        turned: Tensor = self.function(x, x, self.cos, self.sin)[0]
        return turned

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Rotation):
            return NotImplemented
        return self.function is other.function and self.cos is other.cos and self.sin is other.sin

    def __hash__(self) -> int:
        return hash((self.function, id(self.cos), id(self.sin)))


@cache
def rotates(kind: Any) -> bool:
    """Whether a module's class speaks of a rotary embedding."""
    return re.search(r"rotary|(?<![a-z])rope", source_of(kind).lower()) is not None


def rotation(bound: Bound) -> Callable[[Tensor], Tensor] | None:
    """The rotary embedding of this call's tokens; None where the layer has none, or skips it."""
    kind: Any = type(bound.module)
    turns = _turns(kind)
    if not turns and not rotates(kind):
        return None
    try:
        acting = [turn for turn in turns if not turn.tests or all(_holds(test, bound) for test in turn.tests)]
    except (AttributeError, NameError, TypeError):  # a test of more than the module and its angles
        acting = list(turns)
    if turns and not acting:
        return None
    function = acting[0].function if len(acting) == 1 else None
    if function is None or bound.rotary is None:
        return _refused(bound)
    return _Rotation(function, *bound.rotary)


def _refused(bound: Bound) -> Callable[[Tensor], Tensor]:
    def rotate(_: Tensor) -> Tensor:
        raise RefusedModel(
            f"{bound.name} ({bound.kind}) rotates queries and keys in a way of its own, which heedful cannot do to "
            "anything else; restrict the method to other layers with .on(layers=[...])"
        )

    return rotate


def _holds(test: str, bound: Bound) -> bool:
    """A test in the model's own words."""
    return bool(eval(test, {"__builtins__": {}}, {"self": bound.module, ROTARY: bound.rotary}))


@cache
def _turns(kind: Any) -> tuple[_Turn, ...]:
    """Every rotation in a class's forward."""
    for base in kind.__mro__:
        source = own_source(base)
        body = ast.parse(dedent(source)) if source else ast.Module([], [])
        forward = next((x for x in ast.walk(body) if isinstance(x, ast.FunctionDef) and x.name == "forward"), None)
        if forward is not None:
            ordered = f"cos, sin = {ROTARY}" in source
            handed = next(filter(None, map(_handed, ast.walk(forward))), None)
            home = vars(sys.modules[base.__module__])
            return tuple(_turn(x, tests, home if ordered else {}, handed) for x, tests in _found(forward, ()))
    return ()


def _found(node: ast.AST, tests: tuple[str, ...]) -> Iterator[tuple[ast.stmt, tuple[str, ...]]]:
    """Statements that rotate, each with the tests before it."""
    for field, children in ast.iter_fields(node):
        here = tests
        if isinstance(node, ast.If) and field in ("body", "orelse"):
            test = ast.unparse(node.test)
            here = (*tests, test if field == "body" else f"not ({test})")
        for child in children if isinstance(children, list) else [children]:
            if isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try):
                yield from _found(child, here)
            elif isinstance(child, ast.stmt) and any(map(_name, ast.walk(child))):
                yield child, here


def _name(node: ast.AST) -> str | None:
    """The name of a function that rotates, if this calls one."""
    called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    return called if re.search(r"rotary|rotate|(?<![a-z])rope", called) else None


def _handed(node: ast.AST) -> tuple[str, str] | None:
    """What a module hands to its attention as queries and keys, where this is that call."""
    names = [x.id for x in node.args if isinstance(x, ast.Name)] if isinstance(node, ast.Call) else []
    return (names[1], names[2]) if len(names) > 3 and names[0] == "self" else None


def _turn(found: ast.stmt, tests: tuple[str, ...], home: dict[str, Any], handed: tuple[str, str] | None) -> _Turn:
    """A rotation with its function, where that gives whole queries and keys of whole ones."""
    call = found.value if isinstance(found, ast.Assign) else None
    function = home.get(_name(call) or "") if isinstance(call, ast.Call) else None
    if function is None or not isinstance(found, ast.Assign) or not isinstance(call, ast.Call):
        return _Turn(tests, None)
    takes = list(inspect.signature(function).parameters.values())
    laid_out = any(x.name == "unsqueeze_dim" and x.default == 1 for x in takes)  # for [b h n d], whatever is given here
    q, k = handed or ("", "")
    whole = ast.unparse(found.targets[0]) == f"({q}, {k})" and list(map(ast.unparse, call.args[:2])) == [q, k]
    told = [*map(ast.unparse, call.args[2:]), *(x.arg for x in call.keywords if x.arg != "unsqueeze_dim")]
    plain = told == ["cos", "sin"] and [x.name for x in takes[:4]] == ["q", "k", "cos", "sin"]
    return _Turn(tests, function if whole and plain and laid_out else None)
