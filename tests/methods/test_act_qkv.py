"""ActQKV: a probe of unlike queries chooses blocks, in loops over chunks, queries, channels and blocks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods.sparse.decode.act_qkv import ActQKV

N = 23


def _bare(shape: Shape | None = None, text: Tensor | None = None) -> Bare:
    bare = Bare(shape or Shape(k=N, q=N), text=text)
    bare.call = replace(bare.call, query=bare.q, key=bare.k, value=bare.v)
    return bare


def probe(queries: list[list[float]]) -> list[float]:
    """The mean of a chunk's queries, all heads in a row, each weighted by how far from the mean it is."""
    n, width = len(queries), len(queries[0])
    means = [sum(q[c] for q in queries) / n for c in range(width)]
    variances = [sum((q[c] - means[c]) ** 2 for q in queries) / n for c in range(width)]
    floor = sum(variances) / width / 100
    if floor == 0:
        return queries[0]
    far = [sum((q[c] - means[c]) ** 2 / (variances[c] + floor) for c in range(width)) for q in queries]
    return [sum(w * q[c] for w, q in zip(far, queries, strict=True)) / sum(far) for c in range(width)]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def _by_loops(bare: Bare, method: ActQKV, pads: list[int]) -> Tensor:
    """Which keys each query sees `[b q k]`, from the formula."""
    s = bare.shape
    out = torch.zeros(s.b, s.q, s.k, dtype=torch.bool)
    for b, pad in enumerate(pads):
        positions = [s.k - s.q + i - pad for i in range(s.q)]
        ends = {p // method.chunk: p + 1 for p in positions if p >= 0}
        for i, place in enumerate(positions):
            if place < 0:
                continue
            end = ends[place // method.chunk]
            chunk = [j for j, p in enumerate(positions) if p >= 0 and p // method.chunk == place // method.chunk]
            asking = probe([[x for h in range(s.h) for x in bare.q[b, h, j].tolist()] for j in chunk])
            middle = [k for k in range(pad, s.k) if method.sinks <= k - pad < end - method.window]
            blocks = sorted({(k - pad) // method.block for k in middle})

            def like(m: int, b: int = b, pad: int = pad, asking: list[float] = asking) -> float:
                keys = [k for k in range(pad, s.k) if (k - pad) // method.block == m]
                mean = [
                    sum(float(bare.k[b, h // (s.h // s.g), k, c]) for k in keys) / len(keys)
                    for h in range(s.h)
                    for c in range(bare.k.shape[-1])
                ]
                return cosine(asking, mean)

            room = method.budget if isinstance(method.budget, int) else -int(-method.budget * end // 1)
            room -= method.sinks + method.window
            taken: set[int] = set()
            used = 0
            for m in sorted(blocks, key=lambda m: -like(m)):
                gained = [k for k in middle if (k - pad) // method.block == m]
                used += len(gained)
                if used <= room:
                    taken |= set(gained)
            for k in range(pad, s.k - s.q + i + 1):
                out[b, i, k] = k - pad < method.sinks or k - pad >= end - method.window or k in taken
    return out


@pytest.mark.parametrize("pads", [[0, 0], [0, 5]])
@pytest.mark.parametrize("shape", [Shape(k=N, q=N), Shape(k=N, q=7), Shape(k=N, q=1), Shape(k=N, q=N, g=4)])
@pytest.mark.parametrize("method", [ActQKV(12, 2, 4, 4, 3), ActQKV(0.6, 1, 4, 3, 4), ActQKV(9, 1, 5, 5, 2)])
def test_the_formula(method: ActQKV, shape: Shape, pads: list[int]) -> None:
    text = torch.arange(N) >= torch.tensor(pads)[:, None]
    bare = _bare(shape, text)
    part = bare.call.tile(slice(0, shape.q), slice(0, N))
    is_text = text[:, N - shape.q :, None]
    kept = method.select(bare.call.mask, bare.call).keeps(part.pairs)[:, 0]
    assert torch.equal(kept & is_text, _by_loops(bare, method, pads))


def test_a_channel_that_hardly_varies_has_its_variance_raised() -> None:
    # of each chunk of its own: 0.01 of the mean over channels is far above the variance of the first of them
    size = torch.tensor([[0.001, 3.0, 0.5, 1.0]] * 4 + [[0.02, 0.1, 20.0, 0.01]] * 5)
    x = size * torch.randn(9, 4, generator=torch.Generator().manual_seed(5)) + 0.3
    member = torch.tensor([[True] * 4 + [False] * 5, [False] * 4 + [True] * 5])[None]
    found = ActQKV._weights(x.view(9, 2, 2).transpose(0, 1)[None], member)[0] @ x
    wanted = torch.tensor([probe(x[:4].tolist()), probe(x[4:].tolist())])
    assert close(found, wanted)


def test_the_query_that_is_unlike_the_others_is_heard() -> None:
    bare = _bare(Shape(b=1, h=2, g=2, q=32, k=32))
    bare.q[:] = 0.0
    bare.q[..., 0] = 1.0
    bare.q[:, :, 29] = 0.0
    bare.q[:, :, 29, 1] = 1.0
    bare.k[:] = 0.01 * torch.randn(bare.k.shape, generator=torch.Generator().manual_seed(0))
    bare.k[:, :, 8:12, 1] += 1.0
    bare.k[:, :, 16:20, 0] += 1.0
    bare.call = replace(bare.call, query=bare.q, key=bare.k)
    part = bare.call.tile(slice(0, 32), slice(0, 32))
    kept = ActQKV(12, 0, 8, 8, 4).select(bare.call.mask, bare.call).keeps(part.pairs)[0, 0, 31]
    assert bool(kept[8:12].all())
    assert not kept[16:20].any()


def test_says_what_is_wrong() -> None:
    with pytest.raises(FieldError, match=r"ActQKV.block = 0"):
        ActQKV(block=0)
    assert ActQKV(block=1).block == 1
    with pytest.raises(FieldError, match=r"ActQKV.window = 300: must hold a block of 301"):
        ActQKV(window=300, block=301)
    assert ActQKV(window=300, block=300).block == 300
    assert ActQKV(1.0).idle(_bare().call)
