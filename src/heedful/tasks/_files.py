"""Which task a file or a folder of the user's own is, by what it holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from heedful.core.asked import asks
from heedful.core.files import is_there
from heedful.diagnosis import images, waves
from heedful.diagnosis.texts import files_in
from heedful.tasks._boxes import PicturedBoxes
from heedful.tasks._own import OwnChoices, OwnQuestions, OwnText
from heedful.tasks._pictured import PicturedChoices, PicturedQuestions
from heedful.tasks._pictures import OwnPictures, pictures
from heedful.tasks._rows import ROWS, Boxed, Pictured, nothing, rows_of
from heedful.tasks._sounds import OwnSpeech, clips
from heedful.tasks.task import Task

T = TypeVar("T")


@asks
def from_file(path: str | Path, *, length: int = OwnText.length) -> Task:
    """A task from a file or a folder of your own; what it is follows from what it holds.

    A JSONL holds one object a line: a `text`; or a `question` and its `answer`, perhaps on a `context` or about an
    `image`, whose file lies beside; or the same with `choices`, where `answer` is the right one, its letter or its
    place from 0; or a `question` about an `image` and the `box` where a model should look for it. A folder of WAV
    files, each with its words in a `.txt` of the same name, is speech to write down. A folder that has a folder of
    pictures for each class is pictures to name. Any other file is plain text, measured by the loss on windows of
    `length` tokens. What is none of this is left out, and `left_out` says which and why.
    """
    path = Path(path)
    if is_there(path) and path.is_dir() and not _holds(path, (ROWS,)):
        if _holds(path, waves.ENDINGS):
            return OwnSpeech(str(path), *_some(path, clips(path)))
        if _holds(path, images.ENDINGS):
            return OwnPictures(str(path), *_some(path, pictures(path)))
    rows, left_out = rows_of(path)
    first = rows[0]
    if isinstance(first, str):
        return OwnText(str(path), tuple(rows), tuple(left_out), length)
    if isinstance(first, Boxed):
        return PicturedBoxes(str(path), tuple(rows), tuple(left_out))
    kinds = (PicturedQuestions, PicturedChoices) if isinstance(first, Pictured) else (OwnQuestions, OwnChoices)
    return kinds[len(first.options) > 1](str(path), tuple(rows), tuple(left_out))


def _holds(folder: Path, endings: tuple[str, ...]) -> bool:
    return bool(files_in(folder, endings))


def _some(path: Path, found: Iterable[tuple[str, T | str]]) -> tuple[tuple[T, ...], tuple[str, ...]]:
    """Rows, and what was left out and why; an error where no row is left."""
    rows: list[T] = []
    left_out: list[str] = []
    for name, row in found:
        if isinstance(row, str):
            left_out.append(f"{name}: {row}")
        else:
            rows.append(row)
    if not rows:
        raise nothing(path, left_out, "a.wav beside a.txt, or cat/a.png beside dog/b.png")
    return tuple(rows), tuple(left_out)
