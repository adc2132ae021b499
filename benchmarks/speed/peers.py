"""heedful, TransformerLens and nnsight on one model, text and machine, each asked for two numbers of every head."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed.timing import record
from heedful import models

PEERS = ("transformer-lens", "nnsight")
TORCH = os.environ.get("TORCH", "torch==2.13.0")


def measure(quick: bool = False) -> None:
    """In an environment of their own, since they pin what they like; a peer that does not install or run says so."""
    import transformers

    model = models.default().model
    folder, n, rounds = model.config._name_or_path, 256 if quick else 2048, 1 if quick else 3
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="heedful-") as home:
        python = str(Path(home) / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, *PEERS, f"transformers=={transformers.__version__}"], check=True)
        subprocess.run([*pip, "--no-deps", str(Path(__file__).parents[2])], check=True)  # this tree's heedful
        script = str(Path(__file__).with_name("peer.py"))
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, range(os.cpu_count() or 1))  # OMP_PROC_BIND ties this thread, and what it starts
        for name in ("plain", "heedful", *PEERS):
            done = subprocess.run(
                [python, script, name, folder, str(n), str(rounds)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                rows.append({"peer": name, "tokens": n, "failed": done.stderr.strip().splitlines()[-1]})
            else:
                rows.append({"peer": name, "tokens": n, **json.loads(done.stdout.strip().splitlines()[-1])})
            print(rows[-1], flush=True)
    record("peers", rows, model="SmolLM2-135M", asked="weight that each key gets, and entropy, of every head")
