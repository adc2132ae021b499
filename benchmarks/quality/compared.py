"""Ten methods on three tasks, as the README's command asks them, with the default model.

python -m benchmarks.quality.compared [--prompts 300] [--minutes 30]     (HF_HUB_OFFLINE=1, an idle machine; it resumes)
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks.quality.page import COMPARED
from heedful import models
from heedful.bench.compare import compare
from heedful.catalogue import parted, stack_from
from heedful.core.files import RECORDS
from heedful.core.kinds.conversion import Progress

METHODS = (
    "snapkv(budget=0.25),knorm(budget=0.25),heavyhitter(budget=0.25),tokenselect,sinkwindow(4,96),sampleattention,"
    "flexprefill,act,tempscale,snapkv(budget=0.25)|tempscale"
)
TASKS = ("needle", "recall", "loss")


def report(now: Progress) -> None:
    if now.note:
        print(now.note, flush=True)
    if now.done == now.total or now.done % 50 == 0:
        print(f"{now.stage}: {now.done} of {now.total}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.compared")
    parser.add_argument("--prompts", type=int, default=300, help="of each task at most")
    parser.add_argument("--minutes", type=float, default=30, help="of asking")
    given = parser.parse_args()
    home = Path(tempfile.gettempdir()) / "heedful-compared"
    print(f"records grow in {home}", flush=True)
    contenders = [stack_from(text) for text in parted(METHODS)]
    found = compare(models.default(), contenders, TASKS, out=home, progress=report, **vars(given))
    found.save(COMPARED)
    print(found)
    found.page(home / "page.html")
    shutil.copy(home / "page.html", home.with_suffix(".html"))
    (home / RECORDS).unlink()
    print(f"the page: {home.with_suffix('.html')}")
