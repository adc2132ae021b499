"""Images and sounds as a caller gives them: files, folders of them, what is ready for the model, or a list of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from heedful.core.errors import FieldError
from heedful.core.figures import a_few
from heedful.core.files import is_there
from heedful.diagnosis.texts import Source, Texts, files_in

T = TypeVar("T")
Reads = Callable[[Path], tuple[Sequence[T], str]]  # what a file holds, and why it holds nothing


@dataclass(frozen=True)
class Gathering(Generic[T]):
    """How things of one kind are had from whatever a caller gives."""

    name: str  # of one
    endings: tuple[str, ...]  # of files
    folder: str  # a good one
    takes: str  # what a model of this kind takes
    good: str
    reads: Callable[[Any], Reads[T]]  # of what prepares them for the model; asked where there are files alone
    ready: Callable[[Tensor], Sequence[T] | None]  # what a tensor holds, if it is for such a model

    def refuse(self, value: object, rule: str, good: object = None) -> FieldError:
        return FieldError("diagnose()", "texts", value, rule, Path(self.folder) if good is None else good)

    def each(self, given: Texts, reader: Any) -> Iterator[tuple[Source, Sequence[T]]]:
        """By name, or why a file of a folder gives none; a file that is named itself is an error then."""
        if isinstance(given, Path):
            if not is_there(given):
                raise self.refuse(str(given), "no such file or folder")
            found = files_in(given, self.endings) if given.is_dir() else [given]
            if not found:
                raise self.refuse(str(given), f"the folder holds no file that ends in {', '.join(self.endings)}")
            read = self.reads(reader)
            for path in found:
                things, why = read(path)
                if why and path == given:
                    raise self.refuse(str(path), why)
                yield Source(str(path), found=True, unread=why), things
        elif isinstance(given, Tensor) and (ready := self.ready(given)) is not None:
            for thing in ready:
                yield Source(self.name), [thing]
        elif isinstance(given, Sequence) and not isinstance(given, str) and given:
            for one in given:
                yield from self.each(one, reader)
        else:
            raise self.refuse(type(given).__name__, self.takes, self.good)

    def nothing(self, given: Texts, skipped: Sequence[str]) -> FieldError:
        """The error where all that was given could not be read."""
        why = f": {a_few(skipped)}" if skipped else ""
        return self.refuse(str(given), f"holds no {self.name} that can be read{why}")
