"""Every error heedful raises on purpose.

HeedfulError
├── FieldError           a field of a method or an argument has a value the rule forbids (also a ValueError)
│   ├── UnknownFieldError  there is no such field or argument (also a TypeError)
│   ├── TooLittleMemory    the machine's memory does not hold it
│   └── UnusableFile       a file or folder that holds nothing of what it was given for
├── DefinitionError      a method class is written wrongly (also a TypeError)
├── SiteError            an edit returned something its site cannot hold
├── FoldError            an edit that a model's weights cannot hold
├── ClashError           two methods cannot act in one stack
├── StatisticError       statistics that cannot be merged, saved or loaded
│   └── WriteError       a disk that does not take what is written
├── BackendError         the backend asked for cannot serve this stack
├── CatalogueError       no method of that name
└── ModelError           a model cannot be loaded or served
    ├── RefusedModel     heedful knows why it must not touch this model
    ├── NotEntered       an attention layer ran without passing through heedful
    └── UnknownArgument  the model passed something to its attention that heedful does not understand

InactiveWarning          a stack ran and changed nothing where it should have
GuessedWarning           a reader is shown tokens that are guessed, and perhaps taken back
"""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from enum import Enum
from importlib.util import find_spec
from pathlib import PurePath


class HeedfulError(Exception):
    """Base of all errors that heedful raises on purpose; sent to another process it is the same words."""

    def __reduce__(self) -> tuple[object, ...]:
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__ or None  # type: ignore[attr-defined]


class Code(str):
    """A good value that is told by the code that makes it: shown without quotes, so that it can be copied."""

    def __repr__(self) -> str:
        return str(self)


class FieldError(HeedfulError, ValueError):
    """A value outside its rule: names owner, field, value, rule and a good value."""

    def __init__(self, owner: object, field: str, value: object, rule: str, good: object) -> None:
        name = owner if isinstance(owner, str) else type(owner).__name__
        super().__init__(f"{name}.{field} = {shown(value)}: {rule}; for example {field}={shown(good)}")


def shown(value: object) -> str:
    """A value on one line, as one would write it; of what has no such form, its kind and shape."""
    if isinstance(value, PurePath):
        return f"Path({str(value)!r})"  # on every system
    if isinstance(value, Enum):
        return str(value)  # as it is written; a Site has a shape, and is none
    text = repr(value)
    if "\n" not in text and " at 0x" not in text and not hasattr(value, "shape"):
        return text
    return " ".join(["a", type(value).__name__, *(str(tuple(x)) for x in [getattr(value, "shape", ())] if x)])


def shape_of(value: object, typed: bool = False) -> str:
    """The shape of a tensor, with its type where that matters too; the kind of whatever came in the place of one."""
    from torch import Tensor

    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {tuple(value.shape)}" if typed else str(tuple(value.shape))


class UnknownFieldError(FieldError, TypeError):
    """A field or an argument that its owner does not have: names those that it has."""

    def __init__(self, owner: str, field: str, value: object, known: Sequence[str]) -> None:
        told = f"It has {', '.join(known)}" if known else "It has none"
        what = "field" if owner.isidentifier() else "argument"
        HeedfulError.__init__(self, f"{owner}.{field} = {shown(value)}: no such {what}.{nearest(field, known)} {told}")


class TooLittleMemory(FieldError):
    """What the machine's memory does not hold."""


class UnusableFile(FieldError):
    """A file or folder that holds nothing of what it was given for."""

    def __init__(self, owner: str, field: str, path: str, rule: str, good: str) -> None:
        super().__init__(owner, field, path, rule, good)
        self.why = (path, rule, good)


class DefinitionError(HeedfulError, TypeError):
    """A method class that does not follow the rules for methods."""


class SiteError(HeedfulError):
    """An edit gave back something that its site cannot hold."""


class FoldError(HeedfulError):
    """An edit that a model's weights cannot hold; the message gives method, site and reason."""


class ClashError(HeedfulError):
    """Two parts that cannot act together in one stack."""


class StatisticError(HeedfulError):
    """Statistics that cannot be merged, saved or loaded."""


class WriteError(StatisticError):
    """A disk that does not take what is written; nothing half-written counts."""


class BackendError(HeedfulError):
    """The backend that was asked for cannot serve the stack; the message lists every reason."""


class CatalogueError(HeedfulError, KeyError):
    """No such method."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class ModelError(HeedfulError):
    """A model that cannot be loaded or served."""


class RefusedModel(ModelError):
    """A model whose attention heedful knows it cannot serve rightly."""


class NotEntered(ModelError):
    """An attention layer ran its own attention although a run was attached."""


class UnknownArgument(ModelError):
    """The model handed its attention function something that may change the answer and that heedful does not know."""


class InactiveWarning(UserWarning):
    """A stack ran and changed nothing where it should have."""


class GuessedWarning(UserWarning):
    """A reader is shown tokens that are guessed, and counts those that are taken back too."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A 'did you mean' clause, empty when nothing is near to a word, be it a name or the beginning of one."""

    def likeness(name: str) -> float:
        whole, n = name.lower(), len(word)
        return max(SequenceMatcher(None, x, word.lower()).ratio() for x in (whole, whole[:n], whole[: n + 1]))

    near = {name: found for name in known if word and (found := likeness(name)) >= 0.6}
    close = sorted(near, key=lambda name: -near[name])[:3]
    return f" Did you mean {', '.join(close)}?" if close else ""


def first_line(error: BaseException) -> str:
    """What an error says first, or of what kind it is where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def absent(module: str, name: str, known: Iterable[str], more: str = "") -> Exception:
    """For a module's `__getattr__` to raise; `from module import name` swallows an AttributeError and its words."""
    words = f"{module} has no {name!r}.{nearest(name, known)}{more}"
    importing = sys._getframe(2).f_code.co_name == "_handle_fromlist"  # how Python's import asks for a name
    if importing and find_spec(f"{module}.{name}") is None:
        return ImportError(words, name=name, path=module)
    return AttributeError(words, name=name)
