"""Runs the suite's core against several releases of transformers, each in a clean virtual environment.

    python -m benchmarks.versions                     the three newest minor releases, and the oldest supported
    python -m benchmarks.versions 5.22.0 5.17.0       these

Writes benchmarks/records/versions.json, one row a release; a release that was measured before is measured again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "versions.json"
CORE = [
    "tests/test_core.py",
    "tests/test_engine.py",
    "tests/test_run.py",
    "tests/test_laws.py",
    "tests/test_adapters.py",
]
TORCH = os.environ.get("TORCH", "torch==2.13.0")
NEEDS = ["pytest", "pytest-xdist", "hypothesis", "safetensors", "gguf", "typer", "rich", "accelerate"]


def newest(count: int = 3) -> list[str]:
    """The latest patch of each of the newest minor releases, and of the oldest minor release that is supported."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "transformers"], capture_output=True, text=True, check=True
    ).stdout
    listed = re.search(r"Available versions: (.*)", told)
    if listed is None:
        raise SystemExit("pip did not list any release of transformers")
    latest: dict[tuple[int, int], str] = {}
    for version in listed.group(1).split(", "):
        major, minor, *_ = (int(x) for x in version.split("."))
        latest.setdefault((major, minor), version)
    oldest = re.search(r"transformers>=(\d+)\.(\d+)", (ROOT / "pyproject.toml").read_text())
    if oldest is None:
        raise SystemExit("pyproject.toml does not say which transformers is the oldest supported")
    floor = (int(oldest[1]), int(oldest[2]))
    return list(dict.fromkeys([latest[v] for v in sorted(latest, reverse=True)[:count]] + [latest[floor]]))


def measure(release: str) -> dict[str, object]:
    """Install and run; the outcome is what pytest's last line says."""
    with tempfile.TemporaryDirectory(prefix="heedful-") as folder:
        python = Path(folder) / "bin" / "python"
        quiet = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, *quiet, TORCH], check=True)
        subprocess.run([python, *quiet, f"transformers=={release}", *NEEDS], check=True)
        subprocess.run([python, *quiet, "--no-deps", "-e", str(ROOT)], check=True)
        began = time.perf_counter()
        run = subprocess.run(
            [python, "-m", "pytest", "-q", "-n", "2", "--no-header", "-p", "no:cacheprovider", *CORE],
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        ask = "import torch, transformers; print(torch.__version__, transformers.__version__)"
        torch_version, found = subprocess.run(
            [python, "-c", ask], capture_output=True, text=True, check=True
        ).stdout.split()
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    row = {
        "transformers": found, "torch": torch_version, "passed": run.returncode == 0,
        "outcome": lines[-1] if lines else "",
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))][:20],
        "seconds": round(time.perf_counter() - began), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(f"transformers {found}, torch {torch_version}: {row['outcome']}", flush=True)
    return row


def main() -> None:
    rows = {r["transformers"]: r for r in json.loads(RECORD.read_text())} if RECORD.exists() else {}
    for release in sys.argv[1:] or newest():
        row = measure(release)
        rows[row["transformers"]] = row
        RECORD.parent.mkdir(exist_ok=True)
        ordered = sorted(rows.values(), key=lambda r: [int(x) for x in str(r["transformers"]).split(".")], reverse=True)
        RECORD.write_text(json.dumps(ordered, indent=1) + "\n")
    sys.exit(any(not r["passed"] for r in rows.values()))


if __name__ == "__main__":
    main()
