"""The GPU's kernels as machine code for cards that are not here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from heedful import gpu

COMPILED = """
import itertools, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from heedful.gpu import backward, blocks, decode, kernels
from heedful.gpu.backward import Apart, Back
from heedful.gpu.decode import Made, Seen
from heedful.gpu.kernels import Found, Keep, Lines, Sizes

def plain(value, path, found):
    "The signature of a value, with None as a constant, whose place is noted."
    if isinstance(value, tuple):
        return type(value)(*(plain(x, (*path, i), found) for i, x in enumerate(value)))
    if value is None or isinstance(value, int):
        found[path] = value
        return "constexpr"
    return value

def size(fn, target, values):
    found = {}
    signature = {name: plain(x, (i,), found) for i, (name, x) in enumerate(values.items())}
    made = compile(ASTSource(fn=fn, signature=signature, constexprs=found), target=GPUTarget("cuda", target, 32))
    return made.metadata.shared

for kind, width, full in itertools.product(*(eval(x) for x in sys.argv[1:4])):
    fit = blocks.safe(width)
    lines = Lines("*" + kind, "i32", "i32", "i32")
    more = (lambda x: x) if full else (lambda x: None)
    sizes = Sizes(*["i32"] * 7, "fp32", more("fp32"), None)
    keep = Keep("*i32", "i32", "i32", more("*u8"), *["i32"] * 5, more("*u8"), "i32")
    found = Found("*fp32", "*fp32", *map(more, ("*fp32", "*fp32", "*i32", "*fp32", "*fp32")))
    carry, bias = (more(Lines("*fp32", "i32", "i32", "i32")) for _ in range(2))
    tile = dict(BM=fit.rows, BN=fit.keys, BD=width, RANGES=2)
    rows = dict(q=lines, k=lines, v=lines, size=sizes, keep=keep, bias=bias, sink=more("*fp32"), first=more("*i32"),
                carry=carry, found=found, span="i32")
    rest = dict(q=lines, k=lines, lse="*fp32", size=sizes, keep=keep, bias=bias, out="*fp32")
    calls = {
        "attend_rows": {**rows, **dict(BM=fit.rows, BN=fit.keys, BD=width, BE=width, BC=16, RANGES=2)},
        "add_columns": {**rest, **tile},
        "add_diagonals": {**rest, "offset": "i32", "reach": "i32", "B": fit.keys, "BD": width, "RANGES": 2},
    }
    fit = blocks.safe(2 * width)
    both = dict(q=lines, k=lines, v=lines, pull=lines, size=sizes, keep=keep, bias=bias, back=Back("*fp32", "*fp32"))
    ends = dict(BM=fit.rows, BN=fit.keys, BD=width, BE=width, RANGES=2)
    calls["pull_queries"] = {**both, "made": "*fp32", **ends}
    calls["pull_keys"] = {**both, "made_k": "*fp32", "made_v": "*fp32", **ends}
    apart = dict(bias=Lines("*fp32", "i32", "i32", "i32"), apart=Apart("i32", "i32", "i32"), texts="i32", made="*fp32")
    calls["pull_bias"] = {**{k: x for k, x in both.items() if k != "bias"}, **apart, **ends, "ROWS": full}
    seen = Seen("*i32", "i32", more("*i32"), "i32", more("*i64"))
    calls["attend_step"] = dict(q=lines, k=lines, v=lines, size=sizes, seen=seen, bias=bias, sink=more("*fp32"),
        made=Made("*fp32", "*fp32", more("*fp32")), span="i32", BM=16, BN=blocks.safe(width).keys, BD=width, BE=width)
    for target, room in ((80, 163 << 10), (90, 227 << 10)):
        for name, values in calls.items():
            kernel = next(getattr(x, name) for x in (kernels, backward, decode) if hasattr(x, name))
            order = values.values() if name != "pull_bias" else [values[x] for x in (
                "q", "k", "v", "pull", "size", "keep", "bias", "back", "apart", "texts", "made", *ends, "ROWS")]
            used = size(kernel, target, dict(zip(kernel.arg_names, order, strict=True)))
            assert used <= room, (name, kind, width, used)
            print(name, target, kind, width, full, used)
"""


@pytest.mark.parametrize(
    ("kinds", "widths"),
    [
        (["bf16"], [64]),
        pytest.param(["fp32", "fp16"], [16, 64, 128, 256], marks=pytest.mark.slow),
        pytest.param(["bf16"], [128, 256], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_they_compile_for_cards_and_fit_their_shared_memory(kinds: list[str], widths: list[int]) -> None:
    """Down to machine code for Ampere and Hopper, without such a card: with everything asked for, and with nothing."""
    env = {**os.environ, gpu.INTERPRETED: "0"}
    command = [sys.executable, "-c", COMPILED, repr(kinds), repr(widths), "[False, True]"]
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-3000:]
    assert len(told.stdout.splitlines()) == 28 * len(kinds) * len(widths)
