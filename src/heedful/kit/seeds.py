"""What stands for a fit where there is none: numbers drawn by a seed, if the method was given one."""

from __future__ import annotations

from typing import Any

import torch

from heedful.core.errors import FieldError


def seed_of(owner: Any, field: str) -> int:
    """The owner's seed; without one, what should have been fitted is missing."""
    seed: int | None = owner.seed
    if seed is None:
        good = f"heedful.fit({type(owner).__name__}(), model, batches)"
        raise FieldError(owner, field, None, "must be fitted with heedful.fit(), or seed be given", good)
    return seed


def drawn_for(owner: Any, field: str, layer: int) -> torch.Generator:
    """The source of a layer's random numbers."""
    return torch.Generator().manual_seed(4099 * seed_of(owner, field) + layer)
