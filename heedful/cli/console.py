"""What the verbs share: the console, and reading a method from the command line."""

from __future__ import annotations

import ast
from dataclasses import fields

from rich.console import Console

from heedful.catalogue import find
from heedful.core.errors import CatalogueError, FieldError, nearest
from heedful.core.method import Entry

console = Console(highlight=False, soft_wrap=True)


def entry_from(text: str) -> Entry:
    """A method from its name, with settings if they follow: `SinkWindow`, `SinkWindow(sinks=2, window=64)`."""
    name, _, rest = text.partition("(")
    kind = find(name.strip())
    if not rest:
        return kind.example()
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call):
            raise SyntaxError
        values = [ast.literal_eval(node) for node in call.args]
        settings = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as problem:
        raise CatalogueError(
            f"cannot read {text!r}: write it as in Python, for example '{kind.example()!r}'"
        ) from problem
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for word, value in settings.items():
        if word not in known:
            raise FieldError(kind.__name__, word, value, f"no such field.{nearest(word, known)}", known[:1])
    if len(values) > len(known):
        raise FieldError(kind.__name__, "fields", len(values), f"takes at most {len(known)} values", known)
    return kind(*values, **settings)
