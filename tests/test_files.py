"""Files that are whole or not there, and folders that one process writes at a time."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from heedful import models
from heedful.core.errors import FieldError, StatisticError
from heedful.core.files import LOCK, append, digest_of, held, placed, replace_text, scratch
from heedful.diagnosis.run import diagnose

from .apart import APART

IDS = torch.arange(5, 25)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """A disk on which no file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_takes_its_place_whole_with_the_mode_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "a.part").write_text("left by a kill")
    replace_text(tmp_path / "a", "new")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)

    def fail() -> None:
        with placed(tmp_path / "a") as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "a").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "plain"]


def test_a_file_is_on_the_disk_before_it_takes_its_place_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[Path, list[str]]] = []

    def sync(file: int) -> None:
        where = Path(f"/proc/self/fd/{file}").resolve()
        synced.append((where, sorted(p.name for p in tmp_path.iterdir())))

    monkeypatch.setattr(os, "fsync", sync)
    replace_text(tmp_path / "a", "new")
    assert synced == [(tmp_path / "a.part", ["a.part"]), (tmp_path, ["a"])]


def test_what_is_added_to_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    append(file, "one\n")
    with room_for(10), pytest.raises(StatisticError, match=r"records\.jsonl: File too large"):
        append(file, "a line of more than ten bytes\n")
    assert file.read_text() == "one\n"
    append(file, "two\n")
    assert file.read_text() == "one\ntwo\n"


def _holding(folder: str, ready: Any) -> None:
    with held(Path(folder), "a diagnosis"):
        ready.set()
        signal.pause()


def test_a_held_folder_names_its_holder_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    ready = APART.Event()
    other = APART.Process(target=_holding, args=(str(tmp_path), ready))
    other.start()
    try:
        assert ready.wait(60)
        with (
            pytest.raises(StatisticError, match=rf"is being written by process {other.pid} on .*: wait"),
            held(tmp_path, "a diagnosis"),
        ):
            pass
    finally:
        other.kill()
        other.join()
    assert (tmp_path / LOCK).exists()
    with held(tmp_path, "a diagnosis"):
        assert f"process {os.getpid()}" in (tmp_path / LOCK).read_text()
    assert not list(tmp_path.iterdir())


def _working(home: str, name: str, said: Any) -> None:
    tempfile.tempdir = home
    with scratch(name) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        said.put(str(folder))
        signal.pause()


def test_a_scratch_folder_is_gone_with_its_process_or_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forkserver.ensure_running()  # it has a folder too
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with scratch("mine") as folder, scratch("mine") as second:
        assert sorted(tmp_path.iterdir()) == sorted([folder, second])
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(tmp_path.iterdir())
    said = APART.Queue()
    other = APART.Process(target=_working, args=(str(tmp_path), "mine", said))
    other.start()
    try:
        theirs = Path(said.get(timeout=60))
        with scratch("mine") as folder, scratch("other"):
            assert (theirs / "sub" / "file").exists(), "its process lives"
    finally:
        other.kill()
        other.join()
    assert list(tmp_path.iterdir()) == [theirs]
    with scratch("other"):
        assert theirs.exists(), "it has another name"
    (tmp_path / "mine-file").touch()
    with scratch("mine"):
        assert not theirs.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["mine-file"]


def test_a_scratch_folder_is_gone_though_somebody_wrote_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    remove, tries = shutil.rmtree, []

    def late(folder: Path, **how: Any) -> None:
        remove(folder, **how)
        if len(tries) < 2:
            folder.mkdir()
        tries.append(folder)

    monkeypatch.setattr(shutil, "rmtree", late)
    with scratch("mine") as folder:
        pass
    assert tries == [folder] * 3
    assert not list(tmp_path.iterdir())


def test_a_second_run_in_one_process_is_kept_out_too(tmp_path: Path) -> None:
    def again(*_: Any) -> None:
        diagnose(model, IDS, out=tmp_path)

    model = models.tiny("llama")
    with pytest.raises(StatisticError, match="is being written by process"):
        diagnose(model, IDS, out=tmp_path, progress=again)
    diagnose(model, IDS, out=tmp_path)


def test_all_files_of_a_profile_have_one_mode_and_a_kill_leaves_none_behind(tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    for left in ("statistics-0.safetensors.part", "profile.json.part"):
        (tmp_path / left).touch()
        (tmp_path / "unfinished" / left).touch()
    diagnose(models.tiny("llama"), IDS, measures="SinkRate", out=tmp_path)
    assert sorted(p.name.split("-")[0] for p in tmp_path.iterdir()) == ["profile.json", "statistics"]
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1


def test_a_folder_needs_a_name(tmp_path: Path) -> None:
    for name in ("a\0b", ""):
        with pytest.raises(FieldError, match="must be the name of a folder"):
            diagnose(models.tiny("llama"), IDS, out=name)


def test_a_digest_is_of_all_that_a_file_says_but_itself() -> None:
    content = {"facts": {"texts": 3}, "parts": ["A"], "view": None}
    told = digest_of(content)
    assert told == digest_of({**dict(reversed(content.items())), "digest": told})
    for name in content:
        assert digest_of({**content, name: "another"}) != told
        assert digest_of({key: x for key, x in content.items() if key != name}) != told
