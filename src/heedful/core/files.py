"""Files that are whole or not there, folders that one process writes at a time, and what a disk says in plain words."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from heedful.core.errors import FieldError, StatisticError, WriteError

PART = ".part"  # ends the name of a file that is being written
LOCK = ".heedful.lock"
PATIENCE = 50  # tries to take a folder away, a tenth of a second apart
PROFILE, UNFINISHED = "profile.json", "unfinished"  # of a diagnosis, and the folder inside of one under way
RECORDS = "records.jsonl"  # of a comparison
TAUGHT = "conversion.safetensors"  # of a model that is taught another attention
# what shows whose folder one is
SIGNS = {
    "a diagnosis": (PROFILE, f"{UNFINISHED}/{PROFILE}"),
    "a comparison": (RECORDS,),
    "a conversion": (TAUGHT,),
}


def is_there(path: str | Path) -> bool:
    """Whether there is such a file or folder; a system raises for names that are longer than it takes."""
    try:
        return Path(path).exists()
    except OSError:
        return False


def file_digest(path: Path) -> str:
    """A name for all that a file holds, by which it is told from another that is called the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn the ways in which a disk says no into one plain error."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise WriteError(
            f"cannot write to {where}: {reason}; nothing half-written was left there. Free some space, or name another "
            "folder that can be written"
        ) from error


@contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; put in place once all is written, with the mode of any new file."""
    if not path.name or "\0" in str(path):
        raise FieldError("save()", "path", str(path), "must be the name of a file, without null characters", "found")
    beside = path.with_name(path.name + PART)
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.unlink(missing_ok=True)  # as a kill left it
            beside.touch()
            mode = beside.stat().st_mode
            yield beside
            beside.chmod(mode)  # safetensors makes a file of its own, which nobody else may read
            _on_disk(beside)
            beside.replace(path)
            _on_disk(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def _on_disk(path: Path) -> None:
    """Wait until a file, or what a folder says of its files, would outlast a loss of power."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # a system that opens no folders
    file = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def replace_text(path: Path, text: str) -> None:
    """Write a file beside, then rename it."""
    with placed(path) as beside:
        beside.write_text(text, encoding="utf-8")


def digest_of(content: Mapping[str, Any]) -> str:
    """A name for all that a JSON file says, which it keeps as its "digest": by it damage is seen."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a file is to say, as it will be read again, with its digest."""
    told = json.loads(json.dumps(content))
    return {**told, "digest": digest_of(told)}


def append(path: Path, text: str) -> None:
    """Add to a file all of a text, or nothing."""
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        left = text.encode()
        try:
            while left:
                left = left[file.write(left) :]
        except BaseException:
            os.truncate(path, before)
            raise


def folder_named(owner: str, folder: str | Path, field: str = "folder") -> Path:
    """The folder that a caller names."""
    if "\0" in str(folder) or not str(folder):
        raise FieldError(owner, field, str(folder), "must be the name of a folder, without null characters", "kept")
    return Path(folder)


def folder_for(owner: str, out: str | Path | None) -> Path | None:
    """The folder that a caller names for what a verb finds, if any."""
    if out is None:
        return None
    folder = folder_named(owner, out, "out")
    if folder.exists() and not folder.is_dir():
        raise FieldError(owner, "out", str(folder), "is a file, and must be the name of a folder", "kept")
    return folder


@contextmanager
def held(folder: Path | None, what: str) -> Iterator[None]:
    """Make a folder and keep others from writing to it; refuse one that holds something else than `what`."""
    if folder is None:
        yield
        return
    with writing(folder):  # a folder that cannot be written is better known now than in the end
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
    try:
        for other, signs in SIGNS.items():
            if other != what and any((folder / sign).exists() for sign in signs):
                raise StatisticError(f"{folder} holds {other}, and this call makes {what}: name another folder")
        for left in folder.glob(f"*{PART}"):  # nobody else writes here, so a kill left them
            left.unlink(missing_ok=True)
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.close()


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A new temporary folder of this process's own, gone with it; what killed processes left of that name goes too.

    A folder is known to be in use by a lock on itself, which it has before it has its name.
    """
    home = Path(tempfile.gettempdir())
    for left in home.glob(f"{name}-*"):
        if (lock := _lock_of(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    begun = Path(tempfile.mkdtemp(prefix=f".{name}-"))
    lock = _lock_of(begun)
    folder = begun.rename(home / begun.name[1:])
    try:
        yield folder
    finally:
        for _ in range(PATIENCE):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)  # a process that is about to end wrote to it meanwhile
        if lock is not None:
            os.close(lock)


def _lock_of(folder: Path) -> int | None:
    """A lock on a folder itself; none where another process has it, or this one may not, or the system has no such."""
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock

        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (ModuleNotFoundError, OSError):
        return None
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def _locked(folder: Path) -> IO[str]:
    """The open lock of a folder. The system gives it up when its process ends, however that happens."""
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ModuleNotFoundError:  # a system without such locks: nobody is kept out
        return (folder / LOCK).open("a+", encoding="utf-8")
    while True:
        file = (folder / LOCK).open("a+", encoding="utf-8")
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError as taken:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise StatisticError(
                f"{folder} is being written by {holder}: wait until it ends, or name another folder"
            ) from taken
        try:
            same = os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat())
        except FileNotFoundError:
            same = False
        if same:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            return file
        file.close()  # its holder took it away between the two steps
