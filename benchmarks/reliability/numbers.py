"""How far the native kernel and torch's own lie from float64, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from heedful.core.mask import First, Rule, Window

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTILES = {"median": 0.5, "99.9 %": 0.999, "worst": 1.0}
SDPA, STEPS = "SDPA", "step by step"  # what torch has for a case


@dataclass(frozen=True)
class Case:
    """Attention of (b, h, g, n, k, d, e), and what is done to its scores."""

    shape: tuple[int, ...]
    causal: bool = True
    narrowed: bool = False  # to the first tokens and a window
    times: float = 1.0  # of queries that make scores of a spread of 2
    softcap: float | None = None
    biased: bool = False

    @property
    def beside(self) -> str:
        """What of torch's is compared: its kernel has no soft cap."""
        return STEPS if self.softcap else SDPA


CASES = {
    "plain": Case((2, 4, 4, 192, 192, 64, 64), causal=False),
    "grouped, causal": Case((2, 8, 2, 192, 192, 64, 64)),
    "masked: causal, a window, the first four": Case((2, 4, 4, 192, 192, 64, 64), narrowed=True),
    "peaked scores, causal": Case((2, 4, 4, 192, 192, 64, 64), times=8.0),
    "with a bias, causal": Case((2, 4, 4, 192, 192, 64, 64), biased=True),
    "with a soft cap of 20, causal": Case((2, 4, 4, 192, 192, 64, 64), softcap=20.0),
    "rows of 16,384 keys": Case((1, 4, 2, 8, 16384, 64, 64)),
    "one query, 4,096 keys": Case((2, 8, 2, 1, 4096, 64, 64)),
}


def gaps(case: Case, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """By whose they are: distances from float64, in units of the root mean square of what float64 gives."""
    from tests import kernel_calls

    b, h, g, n, m, *_ = case.shape
    q, k, v = kernel_calls.draw(case.shape, seed)
    q, k, v = (x.to(dtype) for x in (case.times * q, k, v))
    bias = 2 * torch.randn(b, h, n, m, generator=torch.Generator().manual_seed(seed)) if case.biased else None
    bias = None if bias is None else bias.to(dtype)
    rules: tuple[Rule, ...] = kernel_calls.CAUSAL if case.causal else ()
    rules = (*rules, Window(64) | First(4)) if case.narrowed else rules
    call = replace(kernel_calls.a_call(case.shape, rules), softcap=case.softcap)
    ours = kernel_calls.run("native", kernel_calls.Same(), q, k, v, call, bias=None if bias is None else bias.float())
    apart = (torch.arange(m - n, m)[:, None] - torch.arange(m))[None, None]
    seen = (apart >= 0) | torch.tensor(not case.causal)
    if case.narrowed:
        seen = seen & ((apart < 64) | (torch.arange(m) < 4))
    k, v = (x.repeat_interleave(h // g, 1) for x in (k, v))
    how = (call.scale, case.softcap)
    wide = None if bias is None else bias.double()
    exact = step_by_step(q.double(), k.double(), v.double(), seen, wide, *how)
    if case.beside == STEPS:
        theirs = step_by_step(q, k, v, seen, bias, *how)
    else:
        hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))
        given = hidden if bias is None else hidden + bias
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # its kernel, or an error
            theirs = scaled_dot_product_attention(q, k, v, attn_mask=given.expand(b, h, n, m), scale=call.scale)
    size = exact.square().mean().sqrt()
    both = {"native": ours, "torch": theirs}
    return {who: ((found.double() - exact).abs() / size).flatten() for who, found in both.items()}


def step_by_step(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention as it is written, as models do it where they look at the map; softmax in float32 at least."""
    scores = (q @ k.mT) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    wide = torch.promote_types(q.dtype, torch.float32)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=wide).to(q.dtype) @ v


def numbers(count: int, ask: Callable[..., dict[str, Tensor]] = gaps) -> dict[str, Any]:
    """So many draws of each case in each type: median, 99.9 % and worst distance of all that came out."""
    rows = []
    for kind, dtype in DTYPES.items():
        for name, case in CASES.items():
            found = [ask(case, dtype, seed) for seed in range(count)]
            told: dict[str, Any] = {"case": name, "dtype": kind, "beside": case.beside}
            for who in ("native", "torch"):
                every = torch.cat([x[who] for x in found]).sort().values
                told["numbers"] = len(every)
                told[who] = {
                    word: float(every[min(len(every) - 1, int(share * len(every)))])
                    for word, share in QUANTILES.items()
                }
            rows.append(told)
            print(told, flush=True)
    return {"draws": count, "rows": rows}
