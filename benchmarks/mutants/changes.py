"""The small changes that can be made to the functions of a file: signs, axes, constants, comparisons, reductions."""

from __future__ import annotations

import ast
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count

# Functions that check fields, name defaults or put results into words: no formula is in them.
LEFT_ALONE = {"__post_init__", "neutral", "example", "describe", "tells", "__repr__", "__str__"}

Change = Callable[[ast.AST], ast.AST]  # a node of its own tree -> what stands in its place

BINARY = {
    ast.Add: ("sign", ast.Sub),
    ast.Sub: ("sign", ast.Add),
    ast.Mult: ("factor", ast.Div),
    ast.Div: ("factor", ast.Mult),
    ast.BitAnd: ("mask", ast.BitOr),
    ast.BitOr: ("mask", ast.BitAnd),
}
COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
RENAMED = {"sum": "mean", "mean": "sum", "any": "all", "all": "any"}
RENAMED |= {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "argmin": "argmax", "argmax": "argmin"}
DROPPED = {"abs", "exp", "log", "log2", "sqrt", "rsqrt", "square", "relu", "tanh", "sigmoid"}
SHAPES = {"view", "reshape", "expand", "unflatten", "view_as", "new_zeros", "new_ones"}  # a wrong size only crashes


@dataclass(frozen=True)
class Mutant:
    """One change: at the `place`-th node of the file, told by a name that does not move with the lines above it."""

    name: str
    kind: str
    function: str
    line: int
    place: int
    turn: int  # which of the node's changes


def _float_or_int(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _with(node: ast.AST, **fields: object) -> ast.AST:
    kept = {name: getattr(node, name) for name in (*node._fields, *node._attributes) if hasattr(node, name)}
    return type(node)(**(kept | fields))


def _negative(value: int) -> ast.AST:
    return ast.UnaryOp(ast.USub(), ast.Constant(value))


def _call_changes(node: ast.Call) -> Iterator[tuple[str, Change]]:
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    if name in RENAMED:
        new = RENAMED[name]
        if isinstance(called, ast.Attribute):
            yield "reduction", lambda n: _with(n, func=_with(n.func, attr=new))  # type: ignore[attr-defined]
        elif name in ("min", "max", "any", "all"):
            yield "reduction", lambda n: _with(n, func=_with(n.func, id=new))  # type: ignore[attr-defined]
    if name in DROPPED:
        if node.args:
            yield "function", lambda n: n.args[0]  # type: ignore[attr-defined]
        elif isinstance(called, ast.Attribute):
            yield "function", lambda n: n.func.value  # type: ignore[attr-defined]
    if name == "norm" and not node.args and all(word.arg != "p" for word in node.keywords):
        yield "norm", lambda n: _with(n, keywords=[*n.keywords, ast.keyword("p", ast.Constant(1))])  # type: ignore[attr-defined]


def changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """What can be changed at this very node, by kind."""
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY and not _text(left) and not _text(right):
            kind, new = BINARY[type(op)]
            yield kind, lambda n: _with(n, op=new())
        case ast.AugAssign(op=op) if type(op) in BINARY:
            kind, new = BINARY[type(op)]
            yield kind, lambda n: _with(n, op=new())
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            if not _float_or_int(operand):
                yield "sign", lambda n: n.operand  # type: ignore[attr-defined]
            elif operand.value in (1, 2):  # type: ignore[attr-defined]
                yield "axis", lambda n: _negative(3 - n.operand.value)  # type: ignore[attr-defined]
            else:
                yield "constant", lambda n: _negative(n.operand.value + 1)  # type: ignore[attr-defined]
        case ast.UnaryOp(op=ast.Invert()):
            yield "mask", lambda n: n.operand  # type: ignore[attr-defined]
        case ast.UnaryOp(op=ast.Not()):
            yield "condition", lambda n: n.operand  # type: ignore[attr-defined]
        case ast.Compare(ops=[op]) if type(op) in COMPARED:
            yield "comparison", lambda n: _with(n, ops=[COMPARED[type(op)]()])
        case ast.Constant(value=bool()):
            yield "switch", lambda n: ast.Constant(not n.value)  # type: ignore[attr-defined]
        case ast.Constant(value=int() | float()):
            yield "constant", lambda n: ast.Constant(n.value + 1)  # type: ignore[attr-defined]
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) if not isinstance(test, ast.UnaryOp):
            yield "condition", lambda n: _with(n, test=ast.UnaryOp(ast.Not(), n.test))  # type: ignore[attr-defined]
        case ast.Call():
            yield from _call_changes(node)


def _refuses(node: ast.AST) -> bool:
    """`raise`, and an `if` that only leads to one: what is refused is another matter than the formula."""
    return isinstance(node, ast.Raise) or (
        isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], ast.Raise)
    )


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body that may be changed, outermost first."""
    if _refuses(node):
        return
    yield node
    hidden: list[object] = []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SHAPES:
        hidden = [arg for arg in node.args if not isinstance(arg, ast.BinOp)]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and _float_or_int(node.operand):
        hidden = [node.operand]
    elif isinstance(node, ast.AnnAssign):
        hidden = [node.annotation]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("FieldError", "zip"):
        return
    elif isinstance(node, ast.FunctionDef):
        hidden = [node.args, node.returns, *node.decorator_list]
    for child in ast.iter_child_nodes(node):
        if not any(child is one for one in hidden):
            yield from _inside(child)


def _functions(node: ast.AST, above: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{above}{child.name}.")
        elif isinstance(child, ast.FunctionDef) and child.name not in LEFT_ALONE:
            yield above + child.name, child


def mutants(source: str) -> list[Mutant]:
    """Every change that can be made to a file."""
    tree = ast.parse(source)
    positions = {id(node): i for i, node in enumerate(ast.walk(tree))}
    found, seen = [], Counter[str]()
    for function, body in _functions(tree):
        for node in (n for statement in body.body for n in _inside(statement)):
            for turn, (kind, change) in enumerate(changes(node)):
                name = f"{function}: {_told(node)} -> {_told(change(node))}"
                seen[name] += 1
                name += f" ({seen[name]})" if seen[name] > 1 else ""
                found.append(Mutant(name, kind, function, node.lineno, positions[id(node)], turn))  # type: ignore[attr-defined]
    return found


class _Computed(ast.NodeTransformer):
    """Leaves out of a file what changes no number: types, checks of fields, words."""

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        """Names are told by where they are used."""

    visit_ImportFrom = visit_Import

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        node.returns = None
        return None if node.name == "__post_init__" else self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(...)
        return self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> ast.AST | None:
        return None if node.arg == "match" else self.generic_visit(node)  # how an error is worded

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if _text(node.value) else self.generic_visit(node)


@cache
def code(source: str) -> str:
    """What a file computes, whatever its layout, its types and its words: what the tests of its formulas depend on."""
    return ast.unparse(ast.fix_missing_locations(_Computed().visit(ast.parse(source))))


def _told(node: ast.AST) -> str:
    """A node in words: of a statement its first line."""
    return ast.unparse(ast.fix_missing_locations(node)).splitlines()[0]


def changed(source: str, mutant: Mutant) -> ast.Module:
    """The file's tree with the one change made."""
    tree = ast.parse(source)
    positions = count()
    target = next(node for node in ast.walk(tree) if next(positions) == mutant.place)
    _, change = list(changes(target))[mutant.turn]
    made = ast.copy_location(change(target), target)

    class Put(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return made if node is target else self.generic_visit(node)

    whole: ast.Module = Put().visit(tree)
    return ast.fix_missing_locations(whole)


def choose(found: list[Mutant], most: int, seed: str) -> list[Mutant]:
    """So many of them, by a seed, spread over functions and kinds: next comes who has fewest of its like chosen."""
    left = sorted(found, key=lambda m: m.name)
    random.Random(seed).shuffle(left)
    chosen: list[Mutant] = []
    likes = Counter[str]()
    while left and len(chosen) < most:
        one = min(left, key=lambda m: likes[m.kind] + likes[m.function])
        left.remove(one)
        likes.update((one.kind, one.function))
        chosen.append(one)
    return sorted(chosen, key=lambda m: (m.line, m.name))
