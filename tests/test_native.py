"""The native kernel against the reference: shapes, masks, blocks, types, what is no number, and memory."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.reliability.problems import sanitizing
from heedful import native
from heedful.conformance.tolerances import close, within_budget
from heedful.core.errors import BackendError
from heedful.core.mask import Blocks, First, Rule, Where, Window
from heedful.core.summary import Summary
from heedful.engine.needs import Needs
from heedful.engine.select import select
from heedful.kit.chosen import Chosen

from .kernel_calls import BIASES, CAUSAL, RULES, Everything, Halved, Same, a_bias, a_call, banded, compare, draw, run

pytestmark = pytest.mark.skipif(
    isinstance(native.library(), str) and shutil.which("g++") is None, reason="no kernel: this machine has no compiler"
)


SHAPES = [
    (2, 4, 2, 19, 19, 8, 8),
    (1, 9, 3, 50, 50, 64, 64),
    (2, 4, 1, 50, 50, 10, 6),
    (1, 1, 1, 1, 1, 4, 4),
    (1, 6, 6, 33, 33, 1, 3),
    (2, 9, 3, 1, 50, 64, 64),
    (1, 8, 2, 7, 50, 80, 80),
    (1, 2, 2, 300, 300, 16, 256),
    (1, 5, 1, 1, 1100, 20, 33),
    (1, 3, 1, 1, 3, 256, 256),
    (1, 7, 1, 129, 129, 128, 128),
]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_agrees_with_the_reference(shape: tuple[int, ...], rules: tuple[Rule, ...]) -> None:
    compare("native", shape, rules)


@pytest.mark.parametrize("n", [50, 3, 1])
def test_padding_on_the_left(n: int) -> None:
    for rules in (CAUSAL, (*CAUSAL, Window(9) | First(2))):
        compare("native", (2, 4, 2, n, 50, 16, 16), rules, pad=torch.tensor([0, 7]))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("size", [32, 64])
def test_block_tables(heads: int, size: int) -> None:
    made = torch.Generator().manual_seed(1)
    count = -(-300 // size)
    table = torch.rand(2, heads, count, count, generator=made) < 0.4
    compare("native", (2, 4, 2, 300, 300, 16, 16), (*CAUSAL, Blocks(table, size)))


@pytest.mark.parametrize("n", [40, 1])
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_sink_logits(n: int, size: float) -> None:
    sink = size * torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(2))
    compare("native", (1, 4, 2, n, 40, 16, 16), CAUSAL, sink=sink)


@pytest.mark.parametrize("n", [20, 1])
@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("softcap", [None, 5.0, 20.0])
def test_soft_caps_and_biases(n: int, biases: tuple[bool, ...], softcap: float | None) -> None:
    shape = (2, 4, 2, n, 700, 16, 16)
    compare("native", shape, CAUSAL, softcap=softcap, bias=a_bias(shape, biases))


@pytest.mark.parametrize("n", [20, 1])
def test_weight_is_moved_under_a_bias_and_a_soft_cap(n: int) -> None:
    shape = (1, 4, 2, n, 40, 16, 16)
    call, bias = replace(a_call(shape, CAUSAL), softcap=1.0), a_bias(shape, BIASES[-1])
    found, want = (run(name, Halved(), *draw(shape), call, bias=bias) for name in ("native", "reference"))
    assert close(found, want)
    assert not close(found, run("native", Same(), *draw(shape), call, bias=bias))


@settings(max_examples=40)
@given(
    n=st.integers(1, 140), past=st.integers(0, 60), heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (5, 5)]),
    d=st.integers(1, 70), e=st.integers(1, 70), window=st.integers(1, 150), softcap=st.sampled_from([None, 5.0]),
    biases=st.sampled_from([None, *BIASES]),
)  # fmt: skip
def test_any_shape_agrees(
    n: int, past: int, heads: tuple[int, int], d: int, e: int, window: int, softcap: float | None, biases: Any
) -> None:
    shape = (1, *heads, n, n + past, d, e)
    bias = None if biases is None else a_bias(shape, biases)
    compare("native", shape, (*CAUSAL, Window(window)), softcap=softcap, bias=bias)


@pytest.mark.parametrize("n", [60, 1])
def test_bfloat16(n: int) -> None:
    shape = (2, 6, 2, n, 60, 32, 32)
    q, k, v = (x.bfloat16() for x in draw(shape))
    call = a_call(shape, CAUSAL)
    found = run("native", Same(), q, k, v, call)
    exact = run("reference", Same(), q.double(), k.double(), v.double(), call)
    assert found.dtype == torch.bfloat16
    assert within_budget(found, run("reference", Same(), q, k, v, call), exact)


@pytest.mark.parametrize("n", [40, 1])
def test_what_is_no_number_reaches_those_who_see_it_and_few_others(n: int) -> None:
    shape = (1, 2, 2, n, 40, 8, 8)
    q, k, v = draw(shape)
    k[0, 0, 20] = v[0, 1, 39, 3] = float("nan")
    call = a_call(shape, CAUSAL)
    found, want = (run(name, Same(), q, k, v, call) for name in ("native", "reference"))
    assert bool(found[0, 0, max(0, 20 - 40 + n) :].isnan().all())
    assert bool(found[0, 1, -1, 3].isnan())
    # a weight of zero times no number is none either; the reference has that in every row, the kernel in its tile's
    clean = want.isfinite()
    assert bool(clean.any())
    assert close(found[clean], want[clean])


@pytest.mark.parametrize("n", [40, 1])
def test_infinity_stays_in_its_row(n: int) -> None:
    shape = (1, 2, 2, n, 40, 8, 8)
    q, k, v = draw(shape)
    q[0, 0, -1] = float("inf")
    call = a_call(shape, CAUSAL)
    found, want = (run(name, Same(), q, k, v, call) for name in ("native", "reference"))
    assert not bool(want[0, 0, -1].isfinite().any())
    assert not bool(found[0, 0, -1].isfinite().any())
    clean = want.isfinite()
    assert close(found[clean], want[clean])


@pytest.mark.parametrize(("n", "hidden"), [(100, slice(61, 100)), (1, slice(10, 70))])
def test_keys_that_are_masked_may_hold_anything(n: int, hidden: slice) -> None:
    """Even values so great that the least weight above zero would show; rows 60 and 61 share a tile."""
    shape = (1, 4, 2, n, 100, 8, 8)
    q, k, v = draw(shape)
    call = a_call(shape, (*CAUSAL, Window(20) | First(4)) if n == 1 else CAUSAL)
    before = run("native", Same(), q, k, v, call)
    k[:, :, hidden], v[:, :, hidden] = 1e30, 3e38
    assert torch.equal(run("native", Same(), q, k, v, call)[:, :, :61], before[:, :, :61])


def test_skipped_blocks_are_not_read() -> None:
    """What lies in blocks that the table leaves out cannot reach the output, not even as no number."""
    shape = (1, 4, 2, 256, 256, 8, 8)
    q, k, v = draw(shape)
    table = torch.eye(8, dtype=torch.bool)[None, None]
    k[:, :, 64:96] = v[:, :, 64:96] = float("nan")
    found = run("native", Same(), q, k, v, a_call(shape, (*CAUSAL, Blocks(table, 32))))
    spoilt = found.isnan().any(-1).any(1)[0].nonzero().flatten()
    assert spoilt.tolist() == list(range(64, 96))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_table_no_more_is_computed_than_from_a_rows_first_key_to_its_last(dtype: torch.dtype) -> None:
    shape = (1, 4, 2, 100, 700, 16, 16)
    q, k, v = (x.to(dtype) for x in draw(shape))
    call = a_call(shape, (banded(100, 700),))
    found, want = (run(name, Same(), q, k, v, call) for name in ("native", "reference"))
    exact = run("reference", Same(), *(x.double() for x in (q, k, v)), call)
    assert within_budget(found, want, exact)
    v[:, :, 7:20] = float("nan")  # keys of the first rows alone
    assert bool(run("native", Same(), q, k, v, call)[:, :, 40:].isfinite().all())


def test_rows_see_keys_that_stand_alone_in_a_table() -> None:
    shape = (1, 4, 2, 100, 700, 16, 16)
    table = torch.rand(1, 4, 100, 700, generator=torch.Generator().manual_seed(0)) < 0.004  # each head its own
    call = a_call(shape, (Chosen(lambda rows: table[:, :, rows]),))
    found, want = (run(name, Same(), *draw(shape), call) for name in ("native", "reference"))
    assert close(found, want)


def test_the_number_of_threads_changes_nothing_but_roundings() -> None:
    shape = (2, 6, 2, 200, 200, 16, 16)
    q, k, v = draw(shape)
    before = torch.get_num_threads()
    outs, told = [], []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            heard: list[Summary] = []
            outs.append(run("native", Everything(heard), q, k, v, a_call(shape, CAUSAL)))
            told.append(heard[0].received)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert close(told[1], told[0])
    assert close(told[2], told[0])


def test_it_is_built_wherever_a_compiler_is() -> None:
    if shutil.which("g++") is None:
        assert "not built" in str(native.library())
    else:
        assert isinstance(native.library(), native.Library)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout": True}, "dropout is on"),
        ({"tensors": (torch.empty(0, device="meta"),)}, "float32 on meta"),
        ({"pattern": True}, "output_attentions"),
        ({"map_steps": ("ACT() at PATTERN",)}, r"ACT\(\) at PATTERN needs the scores or weights"),
    ],
)
def test_what_it_cannot_serve_it_says(change: dict[str, object], reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        select("native", Needs(**change))  # type: ignore[arg-type]


def test_calls_that_it_cannot_serve_are_named() -> None:
    shape = (1, 4, 2, 40, 40, 8, 8)
    q, k, v = draw(shape)
    comb = a_call(shape, (*CAUSAL, Where(lambda a, b: (a - b) % 2 == 0)))
    blocks = a_call(shape, (*CAUSAL, Blocks(torch.ones(1, 1, 3, 3, dtype=torch.bool), 16)))
    for call, reason in ((comb, "too many separate stretches"), (blocks, "multiple of 32")):
        with pytest.raises(BackendError, match=f"{reason}.* tile by tile"):
            run("native", Everything([]), q, k, v, call)
    with pytest.raises(BackendError, match=r"torch\.float64"):
        run("native", Same(), q.double(), k.double(), v.double(), a_call(shape, CAUSAL))


def test_the_environment_picks_a_path() -> None:
    code = "from heedful import native; print(getattr(native.library(), 'path', native.library()))"

    def told(value: str) -> str:
        env = {**os.environ, native.PATH_VARIABLE: value}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout

    for path in getattr(native.library(), "paths", ()):
        assert told(path).strip() == path
    assert "switched off" in told("off")
    assert "this machine has" in told("quantum")


@pytest.mark.slow
@pytest.mark.parametrize("path", ["avx512bf16", "avx512", "avx2", "portable", "sanitized"])
def test_the_same_tests_hold_on_other_builds(path: str, tmp_path: Path) -> None:
    """Every path of the kernel, and the kernel under the address and undefined-behaviour sanitizers."""
    kernel = native.library()
    assert isinstance(kernel, native.Library)
    if path not in (*kernel.paths, "sanitized"):
        pytest.skip(f"this machine has no {path}")
    env = {**os.environ, native.PATH_VARIABLE: path}
    if path == "sanitized":
        env[native.PATH_VARIABLE] = ""
        env |= sanitizing(tmp_path)
    names = ("", "_flat", "_extremes", "_bfloat16", "_picked", "_backward")
    files = [str(Path(__file__).with_name(f"test_native{name}.py")) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def in_features(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, given: Tensor, wide: int = 16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zhang (arXiv 2501.06480) for one window `[n d]`, there and back: features in slices, the map in one piece."""
    slices = [slice(i, i + wide) for i in range(0, q.shape[1], wide)]

    def weights() -> Tensor:
        scores = torch.zeros(len(q), len(k), dtype=torch.float64)
        for part in slices:
            scores += q[:, part] @ k[:, part].T
        raised = (scores * q.shape[1] ** -0.5 + bias - (scores * q.shape[1] ** -0.5 + bias).amax(1, keepdim=True)).exp()
        return raised / raised.sum(1, keepdim=True)

    out = torch.cat([weights() @ v[:, part] for part in slices], 1)
    made, slope = weights(), torch.zeros(len(q), len(k), dtype=torch.float64)
    for part in slices:
        slope += given[:, part] @ v[:, part].T
    slope = made * (slope - (made * slope).sum(1, keepdim=True)) * q.shape[1] ** -0.5
    pulled = [(slope @ k[:, part], slope.T @ q[:, part], made.T @ given[:, part]) for part in slices]
    to_q, to_k, to_v = (torch.cat(parts, 1) for parts in zip(*pulled, strict=True))
    return out, to_q, to_k, to_v


def test_windows_divided_by_features_there_and_back() -> None:
    shape = (3, 2, 2, 49, 49, 32, 32)
    q, k, v = (x.requires_grad_() for x in draw(shape))
    bias, given = (
        a_bias(shape, (False, True, True)),
        torch.randn(3, 2, 49, 32, generator=torch.Generator().manual_seed(5)),
    )
    out = run("native", Same(), q, k, v, a_call(shape, ()), bias=bias)
    found = (out, *torch.autograd.grad(out, (q, k, v), given))
    for window, head in itertools.product(range(3), range(2)):
        mine = (x[window, head].detach().double() for x in (q, k, v, bias.expand(3, -1, -1, -1), given))
        for one, other in zip(found, in_features(*mine), strict=True):
            assert close(one[window, head].detach(), other.float(), 64)
