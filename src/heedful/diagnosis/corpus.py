"""A corpus as shards: pieces that are the corpus's own, whoever reads them, each read text by text."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from heedful.core.asked import require_fields
from heedful.core.errors import FieldError
from heedful.core.files import is_there
from heedful.core.ranges import PositiveInt
from heedful.diagnosis.texts import ENDINGS, LINES, Source, files_in, read_text, why_not

SHARD = 262_144  # bytes of a shard at least; what one worker does before it reports
ROW = 4_096  # bytes that a row counts for where nobody knows its size
MOST_SHARDS = 10_000  # of larger corpora the shards are larger
LONGEST = 64 * 2**20  # bytes of a line of JSON; a longer one is left out, for it would have to be held whole
TABLES = (".parquet",)


@dataclass(frozen=True)
class Corpus:
    """Many texts: a JSONL or Parquet file, a folder of these or of texts, or a `datasets.Dataset`.

    Workers open the files by themselves: on several machines they must lie where all see them under one name.
    """

    where: Any  # a Path, or rows: anything that has a length and gives {column: [texts]} for a slice
    column: str = "text"  # of a table, or the key of a line
    shard: PositiveInt = SHARD  # bytes of one shard at least; a row that lies in no file counts as 4,096

    def __post_init__(self) -> None:
        require_fields(self)
        if isinstance(self.where, str | Path):
            path = Path(self.where)
            object.__setattr__(self, "where", path)
            if not is_there(path):
                raise FieldError(self, "where", path, "there is no such file or folder", Path("corpus.jsonl"))
        elif not (hasattr(self.where, "__len__") and self.column in getattr(self.where, "column_names", ())):
            rule = f"must be a Path, or a datasets.Dataset with a column {self.column!r}"
            raise FieldError(self, "where", type(self.where).__name__, rule, Path("corpus.jsonl"))

    def shards(self) -> tuple[Shard, ...]:
        """The pieces, in the order of the corpus; of one corpus always the same."""
        if not isinstance(self.where, Path):
            rows = len(self.where)
            step = max(1, self.shard // ROW, -(-rows // MOST_SHARDS))
            return tuple(_cut(Rows, self.where, self.column, rows, step))
        files = _files(self.where)
        size = max(self.shard, -(-sum(map(_size, files)) // MOST_SHARDS))
        found = tuple(shard for some in _grouped(files, size) for shard in _shards(some, self.column, size))
        if not found:
            rule = f"the folder holds no file that ends in {', '.join((*LINES, *TABLES, *ENDINGS))}"
            raise FieldError(self, "where", self.where, rule, Path("corpus.jsonl"))
        return found

    def digest(self) -> str:
        """A name for what is to be read, by which a changed corpus is seen: names, sizes and times of files."""
        if not isinstance(self.where, Path):
            told: Any = getattr(self.where, "_fingerprint", None) or len(self.where)
        else:
            told = [[str(p), *_stamp(p)] for p in _files(self.where)]
        return hashlib.sha256(json.dumps([told, self.column, self.shard]).encode()).hexdigest()[:16]


class Shard(ABC):
    """A piece of a corpus."""

    @abstractmethod
    def read(self) -> Iterator[Source]:
        """Its texts; what cannot be read says why, and the rest is read nevertheless."""


@dataclass(frozen=True)
class Files(Shard):
    """Files with one text each."""

    paths: tuple[Path, ...]

    def read(self) -> Iterator[Source]:
        for path in self.paths:
            text, why = read_text(path) if path.is_file() else ("", "is no file that is there")
            yield Source(str(path), text, found=True, unread=why)


@dataclass(frozen=True)
class Stretch(Shard):
    """What begins between two places of something longer."""

    whole: Any  # a Path, or rows
    column: str
    start: int
    stop: int


@dataclass(frozen=True)
class Lines(Stretch):
    """Lines of JSON in a file, from byte to byte."""

    def read(self) -> Iterator[Source]:
        place, told = self.start, False
        try:
            with self.whole.open("rb") as file:
                if place:  # a line that begins before is another shard's
                    file.seek(place - 1)
                    place += _rest(file) - 1
                while place < self.stop and (line := file.readline(LONGEST)):
                    name, size = f"{self.whole} at byte {place}", len(line)
                    if size == LONGEST and not line.endswith(b"\n"):
                        size += _rest(file)
                        yield Source(name, found=True, unread=f"is a line of more than {LONGEST} bytes")
                    elif line.strip():
                        text, why = _text_of(line, self.column)
                        yield Source(name, text, found=True, unread=why)
                    told = told or bool(line.strip())
                    place += size
                if not told and not self.start and not file.read(1):
                    yield Source(str(self.whole), found=True, unread="holds no line")
        except OSError as error:
            yield Source(f"{self.whole} from byte {place}", found=True, unread=f"cannot be read ({error.strerror})")


@dataclass(frozen=True)
class Table(Stretch):
    """Some rows of a Parquet file."""

    def read(self) -> Iterator[Source]:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        place = self.start
        try:
            with ParquetFile(self.whole) as file:
                if self.column not in file.schema_arrow.names:
                    raise LookupError(f"it has no column {self.column!r}")
                end, groups = 0, []
                for i in range(file.metadata.num_row_groups):
                    begin, end = end, end + file.metadata.row_group(i).num_rows
                    if begin < self.stop and end > self.start:
                        groups.append((i, begin))
                if not end:
                    raise LookupError("it has no row")
                row = groups[0][1] if groups else 0
                for batch in file.iter_batches(1024, row_groups=[i for i, _ in groups], columns=[self.column]):
                    inside = batch.slice(max(0, self.start - row), max(0, self.stop - max(row, self.start)))
                    row += len(batch)
                    for value in inside.column(0).to_pylist() if len(inside) else ():
                        yield _source(f"{self.whole} row {place}", value)
                        place += 1
        except (OSError, ArrowException, UnicodeDecodeError, LookupError) as error:
            reason = str(error).partition("\n")[0]
            yield Source(f"{self.whole} from row {place}", found=True, unread=f"cannot be read ({reason})")


@dataclass(frozen=True)
class Rows(Stretch):
    """Some rows of a `datasets.Dataset`."""

    def read(self) -> Iterator[Source]:
        for i, value in enumerate(self.whole[self.start : self.stop][self.column], self.start):
            yield _source(f"row {i}", value)


def _source(name: str, value: Any) -> Source:
    if not isinstance(value, str):
        return Source(name, found=True, unread=f"holds {type(value).__name__} and no text")
    return Source(name, value, found=True, unread=why_not(value))


def _text_of(line: bytes, column: str) -> tuple[str, str]:
    """The text in a line of JSON, and why it has none."""
    try:
        found = json.loads(line)
    except UnicodeDecodeError as error:
        return "", f"is no UTF-8 text (byte {error.start} of the line)"
    except (ValueError, RecursionError):
        return "", "is no line of JSON"
    texts = {key: x for key, x in found.items() if isinstance(x, str)} if isinstance(found, dict) else {}
    if (text := texts.get(column)) is None:
        return "", f"has no text in {column!r}" + (f", but in {next(iter(texts))!r}" if texts else "")
    return text, why_not(text)


def _rest(file: IO[bytes]) -> int:
    """Read on to the next line; how many bytes that took."""
    passed = 0
    while part := file.readline(2**20):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def _files(path: Path) -> list[Path]:
    return files_in(path, (*LINES, *TABLES, *ENDINGS)) if path.is_dir() else [path]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # a link to nothing, say: reading it will tell
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _size(path: Path) -> int:
    return _stamp(path)[0]


def _grouped(files: Iterable[Path], size: int) -> Iterator[list[Path]]:
    """Files one by one, but those of one text each together until they have the size of a shard."""
    some: list[Path] = []
    held = 0
    for path in files:
        alone = path.suffix.lower() in (*LINES, *TABLES)
        if some and (alone or held >= size):
            yield some
            some, held = [], 0
        if alone:
            yield [path]
        else:
            some.append(path)
            held += _size(path)
    if some:
        yield some


def _shards(some: Sequence[Path], column: str, size: int) -> Iterator[Shard]:
    path = some[0]
    if path.suffix.lower() in LINES:
        yield from _cut(Lines, path, column, _size(path) or 1, size)  # one for what has none, to tell why
    elif path.suffix.lower() in TABLES:
        rows = _row_count(path) or 1  # likewise
        step = max(1, rows * size // max(1, _size(path)))
        yield from _cut(Table, path, column, rows, step)
    else:
        yield Files(tuple(some))


def _cut(kind: type[Stretch], whole: Any, column: str, end: int, step: int) -> Iterator[Stretch]:
    return (kind(whole, column, i, min(end, i + step)) for i in range(0, end, step))


def _row_count(path: Path) -> int:
    """A table's rows; one where it cannot be read, so that a shard is there to tell."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_metadata
    except ModuleNotFoundError as error:
        rule = "reading Parquet needs one more package: pip install 'heedful[tables]'"
        raise FieldError("Corpus", "where", path, rule, Path("corpus.jsonl")) from error
    try:
        return int(read_metadata(path).num_rows)
    except (OSError, ArrowException):
        return 1
