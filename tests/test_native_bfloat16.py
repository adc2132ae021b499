"""The native kernel in bfloat16 on every instruction set of this machine: two of them multiply it as it comes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from heedful.conformance.tolerances import LOW_PRECISION, close, error
from heedful.core.mask import Blocks, First, Rule, Window
from heedful.core.summary import PARTS, Summary

from .kernel_calls import BIASES, CAUSAL, RULES, Everything, Same, a_bias, a_call, compare, draw, run
from .test_native import SHAPES, pytestmark
from .test_native_extremes import PATHS, path

__all__ = ["path", "pytestmark"]  # these tests too need a kernel, and run on each of its paths

HALF = torch.bfloat16
REFUSED = """
import ctypes, sys

class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

room = ctypes.create_string_buffer(4096)  # too small for a signal to leave tiles in
asked = ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, len(room))), None)
from heedful.native import library
print(asked, *library().paths)
"""


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_agrees_with_the_reference(shape: tuple[int, ...], rules: tuple[Rule, ...]) -> None:
    compare("native", shape, rules, dtype=HALF)


def test_padding_on_the_left() -> None:
    for rules in (CAUSAL, (*CAUSAL, Window(9) | First(2))):
        compare("native", (2, 4, 2, 50, 50, 16, 16), rules, pad=torch.tensor([0, 7]), dtype=HALF)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("size", [32, 96])
def test_block_tables(heads: int, size: int) -> None:
    count = -(-300 // size)
    table = torch.rand(2, heads, count, count, generator=torch.Generator().manual_seed(1)) < 0.4
    compare("native", (2, 4, 2, 300, 300, 16, 16), (*CAUSAL, Blocks(table, size)), dtype=HALF)


@pytest.mark.parametrize("biases", [None, *BIASES])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_soft_caps_biases_and_sinks(biases: tuple[bool, ...] | None, softcap: float | None) -> None:
    shape = (2, 4, 2, 20, 700, 16, 16)
    bias = None if biases is None else a_bias(shape, biases)
    sink = torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(2))
    compare("native", shape, CAUSAL, softcap=softcap, bias=bias, sink=sink, dtype=HALF)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_the_scale_may_turn_the_order_of_scores_round(scale: float) -> None:
    shape = (1, 4, 2, 70, 330, 32, 32)
    q, k, v = (x.to(HALF) for x in draw(shape))
    call = dataclasses.replace(a_call(shape, CAUSAL), scale=scale)
    heard: list[Summary] = []
    found, eager = (run(name, Everything(heard), q, k, v, call) for name in ("native", "reference"))
    exact = run("reference", Same(), q.double(), k.double(), v.double(), call)
    assert error(found, exact) <= LOW_PRECISION * error(eager, exact)
    for part in set(PARTS) - ({"place"} if scale == 0.0 else set()):  # of equals any may be the place
        assert close(getattr(heard[0], part).float(), getattr(heard[1], part).float()), part


@pytest.mark.parametrize("queries", [1, 70])
def test_what_is_no_number_comes_out_as_none(queries: int) -> None:
    """Heads are rounded by the kernel itself, which must not make numbers of these, nor round otherwise than torch."""
    shape = (1, 4, 2, queries, 70, 32, 32)
    q, k, v = (x.to(HALF) for x in draw(shape))
    v[0, 0, 3, 1], v[0, 1, 5, 2], v[0, 1, 6, 3] = float("nan"), float("inf"), -float("inf")
    call = a_call(shape, CAUSAL)
    seeing = slice(-60, None)  # what a kernel computes of keys that a row does not see is its own affair
    found, eager = (run(name, Same(), q, k, v, call)[:, :, seeing] for name in ("native", "reference"))
    assert found.dtype == HALF
    assert torch.equal(found.isnan(), eager.isnan())
    assert found.isnan().any()
    assert torch.equal(found.isposinf(), eager.isposinf())
    assert torch.equal(found.isneginf(), eager.isneginf())


@pytest.mark.parametrize("queries", [1, 2])
def test_what_lies_between_two_numbers_becomes_the_even_one(queries: int) -> None:
    shape = (1, 1, 1, queries, 2, 16, 16)
    q, k, v = (torch.zeros(1, 1, n, 16, dtype=HALF) for n in (queries, 2, 2))
    v[0, 0] = 1 + torch.arange(17)[:16] / 128 + torch.tensor([0, 1])[:, None] / 128
    found = run("native", Same(), q, k, v, a_call(shape, ()))
    assert torch.equal(found[0, 0], v.float().mean(2)[0].bfloat16().expand(queries, -1))


@pytest.mark.parametrize("heads", [(6, 2), (4, 1), (5, 5)])
def test_the_number_of_threads_changes_no_bit(heads: tuple[int, int]) -> None:
    shape = (2, *heads, 700, 700, 16, 16)
    q, k, v = (x.to(HALF) for x in draw(shape))
    before = torch.get_num_threads()
    told: list[Summary] = []
    try:
        outs = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            outs.append(run("native", Everything(told), q, k, v, a_call(shape, CAUSAL)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, outs[0]) for x in outs)
    for part in PARTS:
        first = getattr(told[0], part)
        assert all(torch.equal(getattr(x, part), first) for x in told[1:]), part


def test_what_a_statistic_costs_is_no_bit_of_the_output() -> None:
    shape = (1, 6, 2, 300, 300, 48, 24)
    q, k, v = (x.to(HALF) for x in draw(shape))
    call = a_call(shape, CAUSAL)
    assert torch.equal(run("native", Everything([]), q, k, v, call), run("native", Same(), q, k, v, call))


def test_torchs_own_kernels_go_on_as_before() -> None:
    """They may keep registers of tiles, which each thread has but once."""
    shape = (1, 4, 4, 300, 300, 64, 64)
    q, k, v = (x.to(HALF) for x in draw(shape))
    call = a_call(shape, CAUSAL)

    def theirs() -> list[torch.Tensor]:
        heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return [heads, q @ k.mT, torch.nn.functional.linear(q, k[0, 0])]

    before, ours = theirs(), run("native", Same(), q, k, v, call)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(theirs(), before, strict=True))
        assert torch.equal(run("native", Same(), q, k, v, call), ours)


@pytest.mark.skipif("amx" not in PATHS, reason="this machine has no tiles")
def test_where_tiles_are_refused_there_are_the_other_paths() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True)
    asked, *paths = done.stdout.split()
    assert asked == "0"
    assert tuple(paths) == PATHS[1:]
