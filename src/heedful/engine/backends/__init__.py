"""Ways to compute one attention call. Each says what it cannot serve; none is chosen behind anybody's back."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends.native import Native
from heedful.engine.backends.reference import Reference
from heedful.engine.backends.sdpa import Sdpa
from heedful.engine.backends.tiled import Tiled
from heedful.engine.backends.triton import Triton
from heedful.engine.needs import Needs


class Backend(Protocol):
    """Computes heads, and the pattern where it is asked for and kept."""

    name: str

    def refuses(self, needs: Needs) -> list[str]:
        """Every reason why this backend cannot serve, empty when it can."""
        ...

    def runs(self, needs: Needs) -> str:
        """What is called, where the name does not say it."""
        ...

    def __call__(self, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]: ...


BACKENDS: dict[str, Backend] = {b.name: b for b in (Sdpa(), Native(), Triton(), Tiled(), Reference())}  # cheapest first
