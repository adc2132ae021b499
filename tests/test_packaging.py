"""What is installed: the lock, the package in its folder, and the wheel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks import deprecations, versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CUDA = re.compile(r"torch|nvidia-.*|cuda-.*")  # triton is there for its interpreter; torch.txt has the same version


def locked(name: str) -> list[tuple[Requirement, bool]]:
    """What a file of the lock holds, and whether each has a hash."""
    entries = re.findall(
        r"^([a-z0-9][^\n\\]*)((?:\\\n +--hash=\S+ ?)*)",
        (ROOT / "requirements" / f"{name}.txt").read_text(),
        re.MULTILINE,
    )
    return [(Requirement(requirement.strip()), "--hash=sha256:" in hashes) for requirement, hashes in entries]


@pytest.mark.parametrize("name", ["build", "lock", "models", "gemma"])
def test_the_lock_has_one_version_and_its_hashes_for_everything(name: str) -> None:
    entries = locked(name)
    assert entries
    for requirement, hashed in entries:
        assert hashed, requirement
        assert [s.operator for s in requirement.specifier] == ["=="], requirement
        assert not CUDA.fullmatch(requirement.name), requirement


def test_the_lock_holds_everything_that_the_project_asks_for() -> None:
    pins = {r.name: r for r, _ in [*locked("lock"), *locked("torch")] if r.marker is None or r.marker.evaluate()}
    for text in [*PROJECT["dependencies"], *chain.from_iterable(EXTRAS.values())]:
        asked = Requirement(text)
        version = next(iter(pins[asked.name].specifier)).version
        assert asked.specifier.contains(version), f"{text} is locked at {version}: make lock"


def test_make_quality_measures_all_that_the_page_holds() -> None:
    programs = [path.stem for path in ROOT.glob("benchmarks/quality/*.py") if "__main__" in path.read_text()]
    run = re.findall(r"-m benchmarks\.quality\.(\w+)", (ROOT / "Makefile").read_text())
    assert sorted(run) == sorted({*programs} - {"press"}), "press runs where kvpress is installed"


def test_what_users_install_is_bounded_on_both_sides() -> None:
    extras = chain.from_iterable(needs for name, needs in EXTRAS.items() if name != "dev")
    for text in [*PROJECT["dependencies"], *extras]:
        assert {s.operator for s in Requirement(text).specifier} == {">=", "<"}, text


def test_the_sets_of_versions_follow_the_project() -> None:
    assert versions.between()[-1] == re.search(r"transformers>=([\d.]+)", str(PROJECT["dependencies"]))[1]
    assert all(re.fullmatch(r"[a-zA-Z0-9-]+", need) for need in versions.asked("newest")[0])
    assert versions.asked("oldest") == (versions.needs(), "lowest-direct")
    assert f"torch=={versions.locked('torch')}" in versions.asked("5.20")[0]


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("`a` is deprecated and will be removed in v5.30.", "5.30"),
        ("it will be removed in version 6.0.0; use `b`", "6.0.0"),
        ("this goes from torch 2.17 on", "2.17"),
        ("`c` is deprecated, please use `d`", "not said"),
    ],
)
def test_a_notice_says_when(text: str, when: str) -> None:
    notice = deprecations.Notice.read(text, "/somewhere/site-packages/torch/nn/x.py")
    assert (notice.package, notice.when) == ("torch", when)


def test_deprecations_are_written_down_whatever_a_test_filters(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text(
        "import logging, warnings, pytest\n"
        "@pytest.mark.parametrize('turn', [1, 2])\n"
        "@pytest.mark.filterwarnings('ignore')\n"
        "def test_ignored(turn): warnings.warn('a goes in v9.1', FutureWarning)\n"
        "@pytest.mark.filterwarnings('error')\n"
        "def test_logged(): logging.getLogger('transformers.x').warning('b is deprecated, until v9.2')\n"
        "@pytest.mark.filterwarnings('error')\n"
        "def test_others_stay_errors(): warnings.warn('c', UserWarning)\n"
    )
    notices = tmp_path / "notices.jsonl"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # as no part of this very run
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.deprecations", "."]
    run = subprocess.run(
        command, cwd=tmp_path, env=alone | {"DEPRECATIONS": str(notices), "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "1 failed, 3 passed" in run.stdout, run.stdout + run.stderr
    assert [(n["text"], n["when"]) for n in deprecations.told(notices)] == [
        ("a goes in v9.1", "9.1"),
        ("b is deprecated, until v9.2", "9.2"),
    ]


def test_the_package_is_found_from_the_folder_above_a_clone(tmp_path: Path) -> None:
    (tmp_path / "heedful").symlink_to(ROOT)
    code = "import heedful; print(heedful.attach.__module__)"
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.stdout.strip() == "heedful.api", told.stderr


def wheel(folder: Path, **env: str) -> Path:
    """A wheel of this tree, built beside it: no network, and nothing that was compiled before."""
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    run = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(folder)],
        env=os.environ | env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return next(folder.glob("*.whl"))


def run_from(built: Path, *command: str) -> str:
    """What Python says with the wheel's package in place of the tree's."""
    place = built.parent / "installed"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(place)
    run = subprocess.run(
        [sys.executable, *command], cwd=built.parent, env=os.environ | {"PYTHONPATH": str(place)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


WHERE = "import heedful.native as n; print(json.dumps([n.__file__, str(n.library())]))"


@pytest.mark.slow
def test_a_wheel_serves_any_python_3_and_runs_the_demo(tmp_path: Path) -> None:
    built = wheel(tmp_path)
    assert re.fullmatch(r"heedful-[\d.]+-py3-none-(?!any)\w+\.whl", built.name)
    assert "heedful/native/kernel.so" in zipfile.ZipFile(built).namelist()
    file, library = json.loads(run_from(built, "-c", f"import json; {WHERE}"))
    assert file.startswith(str(tmp_path))
    assert library.startswith("Library(")
    assert "Reading with a short memory" in run_from(built, "-m", "heedful.cli", "demo", "--length", "64")


@pytest.mark.slow
def test_a_wheel_can_be_built_without_a_compiler(tmp_path: Path) -> None:
    built = wheel(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert "heedful/native/kernel.so" not in zipfile.ZipFile(built).namelist()
    assert "was not built" in run_from(built, "-c", f"import json; {WHERE}")
    drawer = "from heedful import models; print(models.denoiser().name)"
    assert run_from(built, "-c", drawer).strip() == "the small denoiser", "its weights come with it"
