"""What the tests of readers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import heedful


def ids(n: int, seed: int = 0, rows: int = 1) -> Tensor:
    """Texts `[rows n]` of random tokens for a tiny model, none special."""
    return torch.randint(3, 127, (rows, n), generator=torch.Generator().manual_seed(seed))


def found(model: Any, *inputs: dict[str, Tensor], method: Any, **how: Any) -> Any:
    """What a reader has to tell once the model has read all of these; `how` goes to `attach`."""
    with heedful.attach(model, method, **how) as run, torch.no_grad():
        for batch in inputs:
            run(**batch)
        return run[method]


def padded(short: Tensor, long: Tensor, left: bool) -> dict[str, Tensor]:
    """Two texts `[1 n]` in one batch, the shorter with padding on its left or right."""
    pad, one = torch.full((1, long.shape[1] - short.shape[1]), 90), torch.ones_like(short)
    ids = torch.cat([torch.cat([pad, short] if left else [short, pad], 1), long])
    mask = torch.cat([torch.cat([0 * pad, one] if left else [one, 0 * pad], 1), torch.ones_like(long)])
    return {"input_ids": ids, "attention_mask": mask}
