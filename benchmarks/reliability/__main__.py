"""python -m benchmarks.reliability NAME COUNT [NAME COUNT ...]: any of these, each with how often or how long.

kills 100 | damaged 100000 | soak 2000 | mixed 6600 (seconds) | merges 10000 | checkpoints 40 |
two_workers 3 (rounds) | numbers 100 (draws)

These add to what was found before, and keep what they have found when they are cut off: ray_kills 10 | sanitized 5000
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from benchmarks.reliability.damaged import damaged
from benchmarks.reliability.kills import kills, ray_kills
from benchmarks.reliability.merges import checkpoints, merges, two_workers
from benchmarks.reliability.numbers import numbers
from benchmarks.reliability.page import RECORD, load
from benchmarks.reliability.problems import sanitized
from benchmarks.reliability.soak import mixed, soak
from benchmarks.speed.timing import machine
from heedful.core.files import replace_text

MEASURES = {f.__name__: f for f in (kills, damaged, soak, mixed, merges, checkpoints, two_workers, numbers)}
GROWING = {f.__name__: f for f in (ray_kills, sanitized)}


def found(name: str, count: int) -> Iterator[dict[str, Any]]:
    """What is to be recorded; of measures that grow again and again."""
    if name in GROWING:
        yield from GROWING[name](count, load().get(name, {}))
    else:
        yield MEASURES[name](count)


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()  # of this process: whoever calls one of these keeps its own
    transformers.utils.logging.set_verbosity_error()
    for name, count in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        for now in found(name, int(count)):
            record = {**load(), name: {**now, "machine": machine()}}
            replace_text(RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
