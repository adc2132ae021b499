"""Values written as text, as on the command line: `SinkWindow(sinks=2, window=64)`."""

from __future__ import annotations

import ast
from dataclasses import fields
from typing import TypeVar

from heedful.core.errors import CatalogueError, FieldError, UnknownFieldError

T = TypeVar("T")


def name_in(text: str) -> str:
    """The name in front of the settings."""
    return text.partition("(")[0].strip()


def written(text: str, kind: type[T], good: object) -> T:
    """The value of that dataclass with the settings that the text gives, if any; `good` shows how to write one."""
    _, opened, rest = text.partition("(")
    if not opened:
        return kind()
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call):
            raise SyntaxError
        values = [ast.literal_eval(node) for node in call.args]
        settings = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as problem:
        raise CatalogueError(f"cannot read {text!r}: write it as in Python, for example '{good!r}'") from problem
    known = [f.name for f in fields(kind) if f.repr]  # type: ignore[arg-type]  # what is hidden is no setting
    for word, value in settings.items():
        if word not in known:
            raise UnknownFieldError(kind.__name__, word, value, known)
    if len(values) > len(known):
        raise FieldError(kind.__name__, "fields", len(values), f"takes at most {len(known)} values", known)
    for word, value in zip(known, values, strict=False):
        if word in settings:
            raise FieldError(kind.__name__, word, settings[word], f"is given twice, and {value!r} before", value)
    return kind(*values, **settings)
