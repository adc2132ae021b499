"""How many rows and keys a program has at a time: what was measured on a card, and what is safe on any.

`tuned.json` holds what `python -m benchmarks.gpu` found fastest, by architecture, kernel and width of a head. Where it
says nothing the sizes are safe, and not tuned; `explain` says which.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("tuned.json")
SPAN = 1024  # keys to a program, where a call has too few rows to fill a GPU
LEAST = 128  # the same, at least
FEW = 64  # programs below which keys are split
ROWS, BACK, STEP = "rows", "back", "step"  # kinds of kernels: forward and statistics, the way back, one query


@dataclass(frozen=True)
class Tiles:
    """Rows and keys of a tile, and with how many warps and stages of loading it is compiled."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2
    tuned: bool = False

    @property
    def how(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def architecture(device: torch.device) -> str:
    """What sizes hold for, such as `sm_90`; nothing where there is no card."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def table() -> dict[str, dict[str, dict[str, list[int]]]]:
    """By architecture, kind and width: rows, keys, warps and stages."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def tiles(kind: str, width: int, rows: int, q: Tensor, block: int = 0, measured: bool = True) -> Tiles:
    """The sizes for a head so wide and a call of so many rows; a tile lies in one block of a table of blocks.

    Sizes were measured with tensors of 16 bits; those of float32 need twice the room, and take safe ones.
    """
    power = 1 << max(4, (width - 1).bit_length())
    fit = careful = safe(2 * power if kind == BACK else power)
    found = table().get(architecture(q.device), {}).get(kind, {}).get(str(power)) if measured else None
    if found is not None and q.element_size() == 2:
        most, wide, warps, stages = found
        fit = Tiles(most, wide, warps, stages, tuned=True)
    least = max(16, 1 << (max(1, rows) - 1).bit_length())
    keys = fit.keys if not block or block % fit.keys == 0 else careful.keys
    return Tiles(min(fit.rows, least), keys, fit.warps, fit.stages, fit.tuned)


def safe(width: int) -> Tiles:
    """What fits into the shared memory of any card since Ampere, in float32 too: untuned."""
    keys = 64 if width <= 64 else 32 if width <= 128 else 16
    return Tiles(16 if width > 256 else min(64, keys * 2), keys)


def span(keys: int, programs: int, whole: bool = False) -> int:
    """How many keys a program goes through; all of them where there are programs enough, or where it must."""
    if whole or programs >= FEW or keys <= LEAST:
        return max(1, keys)
    share = -(-keys * programs // (4 * FEW))
    return min(SPAN, max(LEAST, 1 << (share - 1).bit_length()))
