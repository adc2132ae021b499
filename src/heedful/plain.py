"""A plain function as a method, to try an idea before it is worth a class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from heedful.core.asked import asks
from heedful.core.call import Call
from heedful.core.errors import Code, FieldError
from heedful.core.method import Method
from heedful.core.sites import Site, at


class _Plain(Method, abstract=True):
    """Does at one site what a function says."""

    function: Callable[[Any, Call], Any]

    def __post_init__(self) -> None:
        if isinstance(self.function, type):
            rule = "must be a function, and no class"
            raise FieldError("edit()", "function", self.function, rule, Code("lambda value, call: 2 * value"))
        try:
            inspect.signature(self.function).bind("value", "call")
        except TypeError as error:
            good = Code("lambda value, call: 2 * value")
            rule = "must take the site's value and the call"
            raise FieldError("edit()", "function", self.function, rule, good) from error
        except ValueError:  # one of C's, which does not tell
            pass

    def __repr__(self) -> str:
        return f"edit({self.edits[0].site}, {getattr(self.function, '__name__', repr(self.function))})"


@cache
def _kind(site: Site) -> type[_Plain]:
    def act(self: _Plain, value: Any, call: Call) -> Any:
        return self.function(value, call)

    body = {"act": at(site)(act), "__module__": __name__, "__repr__": _Plain.__repr__}
    return type(f"_Plain{site.name.title()}", (_Plain,), body)


@asks
def edit(site: Site, function: Callable[[Any, Call], Any]) -> Method:
    """A method that does at one site what a function of the site's value and the call returns.

    It joins, restricts and runs like any other; `call` tells layer, positions, roles and all that methods are told.
    """
    return _kind(site)(function)
