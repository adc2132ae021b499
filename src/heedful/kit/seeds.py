"""What stands for a fit where there is none: numbers drawn by a seed, if the method was given one."""

from __future__ import annotations

from typing import Any

import torch

from heedful.core.errors import Code, FieldError


def seed_of(owner: Any, field: str, to: str = "", batches: str = "batches") -> int:
    """The owner's seed; without one, what should have been fitted (`to` what, and given which `batches`) is missing."""
    seed: int | None = owner.seed
    if seed is None:
        rule = f"must be fitted with heedful.fit(){to and ' ' + to}, or seed be given"
        raise FieldError(owner, field, None, rule, Code(f"heedful.fit({type(owner).__name__}(), model, {batches})"))
    return seed


def drawn_for(owner: Any, field: str, layer: int) -> torch.Generator:
    """The source of a layer's random numbers."""
    return torch.Generator().manual_seed(4099 * seed_of(owner, field) + layer)
