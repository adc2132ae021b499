"""python -m benchmarks.reliability NAME COUNT [NAME COUNT ...]: any of these, each with how often or how long.

kills 100 | ray_kills 30 | damaged 100000 | soak 2000 | mixed 6600 (seconds) | merges 10000 | checkpoints 40 |
simulated 10000 (after merges) | two_workers 3 (rounds)
"""

from __future__ import annotations

import json
import sys

import torch
import transformers

from benchmarks.reliability.damaged import damaged
from benchmarks.reliability.kills import kills, ray_kills
from benchmarks.reliability.merges import checkpoints, merges, simulated, two_workers
from benchmarks.reliability.page import RECORD, load
from benchmarks.reliability.soak import mixed, soak
from benchmarks.speed.timing import machine

MEASURES = {
    f.__name__: f for f in (kills, ray_kills, damaged, soak, mixed, merges, checkpoints, simulated, two_workers)
}


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()  # of this process: whoever calls one of these keeps its own
    transformers.utils.logging.set_verbosity_error()
    for name, count in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        found = {**MEASURES[name](int(count)), "machine": machine()}
        RECORD.write_text(json.dumps({**load(), name: found}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
