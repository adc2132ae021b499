"""`make gpu` on a device that is not there, which refuses to meet the CPU's tensors: started by test_gpu_records.py."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # to be said before kernels are imported

import torch

from benchmarks.gpu.keeping import REHEARSAL, Kept, Room
from benchmarks.gpu.parts import PARTS
from benchmarks.speed import timing
from heedful.engine.backends import triton

from .elsewhere import elsewhere


def main(home: str, *parts: str) -> None:
    timing.RECORDS = Path(home)
    with elsewhere() as device, mock.patch.object(triton, "why_not", return_value=""):
        assert torch.empty(1, device=device).device.type == device.type
        for part in parts:
            kept = Kept(part, device)
            PARTS[part][1](kept, Room(device, REHEARSAL, time.monotonic() + 600))
            kept.write()


if __name__ == "__main__":
    main(*sys.argv[1:])
