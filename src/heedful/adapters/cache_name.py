"""The one place that knows what transformers calls a cache: `cache` since 5.24, `past_key_values` before."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE: Final = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))


def cache_of(output: Any) -> Any:
    """The cache that a model gave back, or None."""
    return output[CACHE] if CACHE in output.keys() else None  # noqa: SIM118 - `in` itself asks for the old names too
