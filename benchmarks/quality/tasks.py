"""What each task's chance level is and what the unedited default model scores.

python -m benchmarks.quality.tasks            measures every task of that model and writes benchmarks/records/tasks.json
python -m benchmarks.quality.tasks NAME ...   measures these and leaves the rest of the record as it is
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import heedful
from claims.ledger import hardware
from heedful import models
from heedful.bench.answer import answer
from heedful.tasks import find, known
from heedful.tasks.task import Task
from heedful.text_models import TextModel, text_model

RECORD = Path(__file__).parent.parent / "records" / "tasks.json"


def measure(task: Task, speaker: TextModel, tokenizer: Any, count: int) -> dict[str, Any]:
    """One task's row."""
    began = time.perf_counter()
    items = task.items(tokenizer, count)
    scores = [task.score(item, answer(speaker, item)) for item in items]
    chances = [chance for item in items if (chance := task.chance(item)) is not None]
    return {
        "task": repr(task), "about": task.about, "unit": task.unit, "more_is_better": task.more_is_better,
        "chance": statistics.fmean(chances) if chances else None, "score": statistics.fmean(scores),
        "error": statistics.stdev(scores) / math.sqrt(count), "items": count,
        "tokens": round(statistics.fmean(len(item.prompt) for item in items)),
        "by": {label: _by([item.labels[label] for item in items], scores) for label in items[0].labels},
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def _by(values: list[float | str], scores: list[float]) -> dict[str, float]:
    """Mean scores by a label's values, unless there are too many of them to tell anything."""
    groups: dict[str, list[float]] = {}
    for value, score in zip(values, scores, strict=True):
        groups.setdefault(f"{value:.3g}" if isinstance(value, float) else str(value), []).append(score)
    return {value: statistics.fmean(group) for value, group in groups.items()} if 1 < len(groups) < 9 else {}


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the tasks on the unedited default model")
    parser.add_argument("names", nargs="*", help="tasks; all by default")
    parser.add_argument("--count", type=int, default=40, help="items of each task")
    asked = parser.parse_args()
    model, tokenizer, name = models.default()
    rows = json.loads(RECORD.read_text())["tasks"] if asked.names and RECORD.exists() else {}
    with text_model(model) as speaker:
        for task in map(find, asked.names or [name for name, kind in known().items() if kind.model == Task.model]):
            rows[task.name] = row = measure(task, speaker, tokenizer, asked.count)
            chance = "none" if row["chance"] is None else f"{row['chance']:.3g}"
            print(f"{row['task']}: {row['score']:.3g} ± {row['error']:.2g} {row['unit']}, chance {chance}", flush=True)
    # The texts of some tasks are Python's own help, which changes from release to release.
    versions = {"heedful": heedful.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions["python"] = platform.python_version()
    record = {"model": name, "date": time.strftime("%Y-%m-%d"), "versions": versions, "hardware": hardware()}
    RECORD.write_text(json.dumps({**record, "tasks": dict(sorted(rows.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
