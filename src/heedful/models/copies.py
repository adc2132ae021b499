"""Copies kept of models that come packed in another form: made at first use, and there whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from heedful.core.code import sources
from heedful.core.errors import ModelError, first_line
from heedful.core.files import file_digest

MONTH = 30 * 24 * 3600  # seconds
FOLLOWED = ("heedful.models.",)  # whose code counts wherever a conversion uses it
Convert = Callable[[Sequence[Path], Path], None]  # of a model's files, the first of which names it, into a folder
SOURCE = "source.json"  # in a copy, says what it is of
DRAFT, GONE = ".draft-", ".gone-"  # names of folders on their way to a copy, and to nothing
log = logging.getLogger(__name__)


def unpacked(paths: Sequence[Path], convert: Convert, takes: str) -> Path:
    """The folder with the float32 copy of a model's files, which `convert` writes if it is not there yet.

    Code that converts otherwise has a copy of its own beside it. Where one is made, those of the same file that nobody
    has asked for in a month go.
    """
    path = paths[0]
    digest, code = file_digest(path), _code(convert)
    source = {"code": code, "file": path.name, "size": path.stat().st_size, "sha256": digest}
    file = f"{path.stem}-{digest[:12]}"
    home = cache_folder() / f"{file}-{code[:8]}"
    with suppress(OSError):  # there is none yet, or it may be read alone; else it was asked for now
        os.utime(home)
    if not _is_copy(home, source):
        log.warning("unpacking %s once, about %s; the copy stays in %s", path.name, takes, home)
        try:
            home.parent.mkdir(parents=True, exist_ok=True)
            _make_copy(paths, home, source, convert)
            left = (home.parent.glob(f"{name}*") for name in (DRAFT, GONE))  # by processes that were killed
            _drop_unused([*home.parent.glob(f"{glob.escape(file)}*"), *itertools.chain(*left)])
        except OSError as error:
            raise ModelError(
                f"{path.name}: cannot keep the unpacked copy in {home}: {first_line(error)}; "
                "set XDG_CACHE_HOME to a folder that can be written and has room for four bytes a parameter"
            ) from error
    return home


def _drop_unused(homes: Iterable[Path]) -> None:
    """Remove those that nobody has asked for in a month; whoever reads one meanwhile finds all of it or none."""
    for home in homes:
        with suppress(OSError):  # another process was first, or has it open and may not be disturbed
            if not _is_unused(home):
                continue
            away = Path(tempfile.mkdtemp(prefix=GONE, dir=home.parent))
            try:
                moved = home.rename(away / home.name)
                if not _is_unused(moved):  # somebody asked for it just now
                    with suppress(OSError):  # and has made it anew
                        moved.rename(home)
            finally:
                shutil.rmtree(away, ignore_errors=True)


def _is_unused(home: Path) -> bool:
    return home.stat().st_mtime < time.time() - MONTH


def _code(convert: Convert) -> str:
    """A short name for the files that say what a conversion does."""
    return hashlib.sha256("\n".join(sources([convert.__module__], FOLLOWED)).encode()).hexdigest()[:16]


def _make_copy(paths: Sequence[Path], home: Path, source: dict[str, Any], convert: Convert) -> None:
    """Write beside `home` and rename, so that a copy is there whole or not at all, whoever else makes one."""
    draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=home.parent))
    try:
        convert(paths, draft)
        written = {**source, "weights": (draft / "model.safetensors").stat().st_size}
        (draft / SOURCE).write_text(json.dumps(written, indent=1), encoding="utf-8")
        if home.exists() and not _is_copy(home, source):
            with suppress(FileNotFoundError):  # another process has moved it away just now
                home.rename(draft / "spoilt")
        try:
            draft.rename(home)
        except OSError:
            if not _is_copy(home, source):  # else another process was first, with the same bytes
                raise
        shutil.rmtree(home / "spoilt", ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def copied(home: Path) -> str:
    """What a copy is a copy of, as its file is called; of a folder that is none, its own name."""
    try:
        return Path(json.loads((home / SOURCE).read_text(encoding="utf-8"))["file"]).stem
    except (OSError, ValueError, TypeError, KeyError):
        return home.name


def _is_copy(home: Path, source: dict[str, Any]) -> bool:
    try:
        written = json.loads((home / SOURCE).read_text(encoding="utf-8"))
        weights = (home / "model.safetensors").stat().st_size
    except (OSError, ValueError):
        return False
    return bool(written == {**source, "weights": weights})


def cache_folder() -> Path:
    """Where copies lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heedful"
