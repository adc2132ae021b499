"""What stands in a user's files, row by row, and why a row cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from heedful.core.errors import UnusableFile
from heedful.core.figures import a_few
from heedful.core.files import file_digest, is_there
from heedful.diagnosis.images import opened
from heedful.diagnosis.texts import ENDINGS, files_in, read_text

ALSO = {"context": ("context", "document"), "answer": ("answer", "answers"), "choices": ("choices", "options")}
SHORT = 32  # characters below which a text tells nothing
ROWS = ".jsonl"


@dataclass(frozen=True)
class Asked:
    """A question, perhaps on a context, and its answers, the right one first."""

    context: str
    question: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Pictured(Asked):
    """The same about a picture."""

    image: str  # its file, beside the rows'
    digest: str
    file: str = field(repr=False)  # where it lies


@dataclass(frozen=True)
class Boxed(Pictured):
    """A question about a picture whose answer stands in a box there."""

    box: tuple[float, float, float, float]  # left, top, right and bottom, in dots from the upper left corner


Row = str | Asked
YES_NO = ("yes", "no")  # either of which, as the answer about a picture, has the other for a choice


class _BrokenError(ValueError):
    """Why a row cannot be used."""

    good = ""  # what of its kind can be, where that kind is known


def _like(found: Mapping[str, Any]) -> str:
    """A good row of the kind that a broken one seems to be."""

    def has(name: str) -> bool:
        return any(other in found for other in ALSO.get(name, (name,)))

    if has("text") and not has("question"):
        return json.dumps({"text": "..."})
    beside = {"image": "street.png"} if has("image") or has("box") else {"context": "..."}
    asked: dict[str, Any] = {"answer": "..."}
    if has("box"):
        asked = {"box": [0, 0, 40, 30]}
    elif has("choices"):
        asked = {"choices": ["...", "..."], "answer": 0}
    return json.dumps({**beside, "question": "...", **asked})


GOOD = _like({})


def rows_of(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a file or of a folder's files, all of the first one's kind, and what was left out and why."""
    rows: list[Row] = []
    left_out: list[str] = []
    good = ""
    for where, found in _each(path):
        if isinstance(found, _BrokenError):
            left_out.append(f"{where}: {found}")
            good = good or found.good
        elif rows and _kind(found) != _kind(rows[0]):
            one, other = _kind(found), _kind(rows[0])
            left_out.append(f"{where}: is {one}, and those before are {other}; give each kind a file of its own")
        else:
            rows.append(found)
    if not rows:
        raise nothing(path, left_out, good or GOOD)
    return rows, left_out


def nothing(path: Path, left_out: Sequence[str], good: str) -> UnusableFile:
    """The error where no row is left."""
    why = f": {a_few(left_out)}" if left_out else ""
    return _refuse(path, f"holds nothing that can be asked{why}", good)


@contextmanager
def named_as(owner: str, field: str) -> Iterator[None]:
    """While a task is made of what `owner` was given as its `field`: an error of the file names these."""
    try:
        yield
    except UnusableFile as error:
        raise UnusableFile(owner, field, *error.why) from None


def _refuse(path: Path, rule: str, good: str = "my.jsonl") -> UnusableFile:
    return UnusableFile("from_file()", "path", str(path), rule, good)


def _kind(row: Row) -> str:
    if isinstance(row, str):
        return "plain text"
    if isinstance(row, Boxed):
        return "a question about a picture with a box"
    about = " about a picture" if isinstance(row, Pictured) else ""
    return f"a question{about} with choices" if len(row.options) > 1 else f"a question{about}"


def _each(path: Path) -> Iterator[tuple[str, Row | _BrokenError]]:
    """Every row with where it stands."""
    if not is_there(path):
        raise _refuse(path, "no such file or folder")
    if not path.is_dir():
        yield from _file(path, path.name)
        return
    files = files_in(path, ENDINGS)
    if not files:
        also = "sounds with their words, nor folders of pictures"
        raise _refuse(path, f"the folder holds no file that ends in {', '.join(ENDINGS)}, nor {also}")
    for file in files:
        yield from _file(file, str(file.relative_to(path)))


def _file(path: Path, name: str) -> Iterator[tuple[str, Row | _BrokenError]]:
    text, why = read_text(path)
    if why:
        yield name, _BrokenError(why)
        return
    if path.suffix.lower() != ROWS:
        yield name, _tried(_text, {"text": text}, "a longer text")
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"{name}, line {number}", _tried(partial(_row, beside=path.parent), line)


def _tried(read: Any, what: Any, good: str = "") -> Row | _BrokenError:
    try:
        row: Row = read(what)
    except _BrokenError as broken:
        broken.good = broken.good or good
        return broken
    return row


def _row(line: str, beside: Path) -> Row:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _BrokenError(f"is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise _BrokenError(f"must hold an object, as in {GOOD}")
    try:
        return _of(found, beside)
    except _BrokenError as broken:
        broken.good = _like(found)
        raise


def _of(found: Mapping[str, Any], beside: Path) -> Row:
    if "question" not in found:
        if "text" in found:
            return _text(found)
        raise _BrokenError(f"has neither 'question' nor 'text' but {', '.join(map(repr, found)) or 'nothing'}")
    context = _words(found, "context") if any(name in found for name in ALSO["context"]) else ""
    question = _words(found, "question")
    if "box" in found:
        return _boxed(found, context, question, beside)
    options = _choices(found) if any(name in found for name in ALSO["choices"]) else (_words(found, "answer"),)
    if "image" not in found:
        return Asked(context, question, options)
    name, file, digest, _ = _picture(found, beside)
    if len(options) == 1 and options[0].lower() in YES_NO:
        options = (options[0], *(other for other in YES_NO if other != options[0].lower()))
    return Pictured(context, question, options, name, digest, file)


def _picture(found: Mapping[str, Any], beside: Path) -> tuple[str, str, str, tuple[int, int]]:
    """A picture's name, where it lies, what it holds in short, and how wide and high it is."""
    name = _words(found, "image")
    file = beside / name
    picture, why = opened(file) if is_there(file) and file.is_file() else (None, "is no file beside this one")
    if picture is None:
        raise _BrokenError(f"'image' is {name!r}, which {why}")
    return name, str(file), file_digest(file)[:16], picture.size


def _boxed(found: Mapping[str, Any], context: str, question: str, beside: Path) -> Boxed:
    if also := [name for names in ALSO.values() for name in names if name in found and name not in ALSO["context"]]:
        raise _BrokenError(f"has both 'box' and {also[0]!r}; give where to look and what to say a row each")
    name, file, digest, (width, height) = _picture(found, beside)
    box = found["box"]
    if not isinstance(box, list) or len(box) != 4 or not all(type(x) in (int, float) for x in box):
        raise _BrokenError(f"'box' is {box!r}, and must be four numbers: left, top, right, bottom, in dots")
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise _BrokenError(
            f"'box' is {box!r}, and must be left, top, right, bottom, with left < right and top < bottom, in a picture "
            f"of {width} x {height} dots; [0, 0, {width}, {height}] is all of it"
        )
    return Boxed(context, question, (), name, digest, file, (left, top, right, bottom))


def _given(found: Mapping[str, Any], name: str) -> Any:
    """The value of a key, under any of its names."""
    value = next((found[other] for other in ALSO.get(name, (name,)) if other in found), None)
    if value is None:
        raise _BrokenError(f"has no {name!r}")
    return value


def _words(found: Mapping[str, Any], name: str) -> str:
    """A value as text; of several answers the first."""
    value = _given(found, name)
    if name == "answer" and isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise _BrokenError(f"{name!r} is {value!r}, and must be text")
    return str(value).strip()


def _text(found: Mapping[str, Any]) -> str:
    text = _words(found, "text")
    if len(text) < SHORT:
        raise _BrokenError(f"is a text of {len(text)} characters, and less than {SHORT} tell nothing")
    return text


def _choices(found: Mapping[str, Any]) -> tuple[str, ...]:
    """The options, the right one first. The answer is one of them, its letter, or its place from 0."""
    given = _given(found, "choices")
    options = [str(x).strip() for x in given] if isinstance(given, list) else []
    if len(options) < 2 or len(set(options)) < len(options) or not all(options):
        raise _BrokenError(f"'choices' is {given!r}, and must be two or more different texts")
    answer = _given(found, "answer")
    letters = {chr(ord("A") + i): i for i in range(len(options))}
    if isinstance(answer, int) and not isinstance(answer, bool):
        place = answer if 0 <= answer < len(options) else None
    else:
        said = str(answer).strip()
        place = options.index(said) if said in options else letters.get(said.upper())
    if place is None:
        raise _BrokenError(f"'answer' is {answer!r}: none of the choices, nor the letter or place of one")
    return (options[place], *options[:place], *options[place + 1 :])
