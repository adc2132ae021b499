"""The whole map at once, in at least float32: readable, and by definition correct."""

from __future__ import annotations

from torch import Tensor

from heedful.core.values import replace
from heedful.engine.attend import tile
from heedful.engine.attention_call import AttentionCall
from heedful.engine.needs import Needs
from heedful.engine.precision import wide


class Reference:
    name = "reference"

    def refuses(self, needs: Needs) -> list[str]:
        return []

    def runs(self, needs: Needs) -> str:
        return ""

    def __call__(self, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        call = job.call.tile(slice(0, q.shape[2]), slice(0, k.shape[2]))
        call = replace(call, keep=call.mask.keeps(call.pairs), above=job.call.earlier)
        heads, pattern = tile(job, call, wide(q), call.spread(wide(k)), call.spread(wide(v)))
        return heads, pattern if job.keep_pattern else None
