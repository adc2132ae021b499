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
from heedful.gpu import backward, blocks, decode, kernels, weighing
from heedful.gpu.backward import Apart, Back
from heedful.gpu.decode import Made, Seen
from heedful.gpu.kernels import Found, Keep, Lines, Sizes

def plain(value, path, found, even):
    "The signature of a value, with None and numbers as constants, whose places are noted, as are multiples of 16."
    if isinstance(value, tuple):
        return type(value)(*(plain(x, (*path, i), found, even) for i, x in enumerate(value)))
    if value is None or isinstance(value, int):
        found[path] = value
        return "constexpr"
    if value.startswith("*") or value == "even":
        even[path] = [["tt.divisibility", 16]]
    return "i32" if value == "even" else value

def made(fn, target, values, fit):
    found, even = {}, {}
    signature = {name: plain(x, (i,), found, even) for i, (name, x) in enumerate(values.items())}
    source = ASTSource(fn=fn, signature=signature, constexprs=found, attrs=even)
    return compile(source, target=GPUTarget("cuda", target, 32), options=fit.how)

for kind, width, asked in itertools.product(*(eval(x) for x in sys.argv[1:4])):
    full, one = asked == "all", asked == "ones"  # ones: a number that is 1 is a constant
    number, even, ranges = 1 if one else "i32", "i32" if one else "even", 2 if full else 1
    lines = Lines("*" + kind, even, even, even)
    more = (lambda x: x) if full else (lambda x: None)
    sizes = Sizes(number, number, number, number, *[1 if one else "even"] * 3, "fp32", more("fp32"), None)
    keep = Keep("*i32", even, even, more("*u8"), *[number] * 5, more("*u8"), number)
    found = Found("*fp32", "*fp32", *map(more, ("*fp32", "*fp32", "*i32", "*fp32", "*fp32")))
    carry, bias = (more(Lines("*fp32", even, even, even)) for _ in range(2))
    fit = blocks.safe(width)
    tile = dict(BM=fit.rows, BN=fit.keys, BD=width, RANGES=ranges)
    rows = dict(q=lines, k=lines, v=lines, size=sizes, keep=keep, bias=bias, sink=more("*fp32"), first=more("*i32"),
                carry=carry, found=found, span=number)
    rest = dict(q=lines, k=lines, lse="*fp32", size=sizes, keep=keep, bias=bias, out="*fp32")
    sigmoid = sizes._replace(sigmoid="fp32")
    calls = {
        "weigh_rows": {**{k: x for k, x in rows.items() if k != "sink"}, "size": sigmoid,
            **dict(BM=fit.rows, BN=fit.keys, BD=width, BE=width, BC=16, RANGES=ranges, MEAN=full)},
        "attend_rows": {**rows, **dict(BM=fit.rows, BN=fit.keys, BD=width, BE=width, BC=16, RANGES=ranges)},
        "add_columns": {**rest, **tile},
        "add_diagonals": {**rest, "offset": number, "reach": number, "B": fit.keys, "BD": width, "RANGES": ranges},
    }
    back = blocks.safe(2 * width)
    both = dict(q=lines, k=lines, v=lines, pull=lines, size=sizes, keep=keep, bias=bias,
                back=Back("*fp32", "*fp32", more(Lines("*fp32", even, even, even))))
    ends = dict(BM=back.rows, BN=back.keys, BD=width, BE=width, RANGES=ranges)
    calls["meet_columns"] = {k: x for k, x in {**both, **ends}.items() if k not in ("v", "pull", "BE")}
    calls["meet_columns"]["back"] = Back("*fp32", "*fp32", Lines("*fp32", even, even, even))
    calls["pull_queries"] = {**both, "made": "*fp32", **ends}
    calls["pull_keys"] = {**both, "made_k": "*fp32", "made_v": "*fp32", **ends}
    calls["pull_keys of sigmoids"] = {**calls["pull_keys"], "size": sigmoid}
    apart = dict(bias=Lines("*fp32", even, even, even), apart=Apart(*[number] * 3), texts=number, made="*fp32")
    calls["pull_bias"] = {**{k: x for k, x in both.items() if k != "bias"}, **apart, **ends, "ROWS": full}
    seen = Seen("*i32", number, more("*i32"), number, more("*i64"))
    calls["attend_step"] = dict(q=lines, k=lines, v=lines, size=sizes, seen=seen, bias=bias, sink=more("*fp32"),
        made=Made("*fp32", "*fp32", more("*fp32")), span=number, BM=16, BN=blocks.safe(width).keys, BD=width, BE=width,
        MEAN=False)
    calls["attend_step of sigmoids"] = {**calls["attend_step"], "size": sigmoid, "MEAN": full}
    for target in (80, 90):
        for name, values in calls.items():
            kernel, *_ = (getattr(x, found) for x in (kernels, backward, decode, weighing)
                          if hasattr(x, found := name.split()[0]))
            order = values.values() if name != "pull_bias" else [values[x] for x in (
                "q", "k", "v", "pull", "size", "keep", "bias", "back", "apart", "texts", "made", *ends, "ROWS")]
            values = dict(zip(kernel.arg_names, order, strict=True))
            code = made(kernel, target, values, back if "pull" in name or "meet" in name else fit)
            loads = code.asm["ptx"].count("cp.async")
            print(name.replace(" ", "_"), target, kind, width, asked, code.metadata.shared, loads)
"""
ROOM = 99 << 10  # bytes of shared memory of a block, on the cards since Ampere that have least
MEANWHILE = (
    "attend_rows",
    "weigh_rows",
    "add_columns",
    "add_diagonals",
    "meet_columns",
    "pull_queries",
    "pull_keys",
    "attend_step",
)


@pytest.mark.parametrize(
    ("kinds", "widths", "asked"),
    [
        (["bf16"], [64], ["nothing", "all"]),
        pytest.param(["bf16"], [64], ["ones"], marks=pytest.mark.slow),
        pytest.param(["fp32", "fp16"], [16, 64, 128], ["nothing", "all"], marks=pytest.mark.slow),
        pytest.param(["fp32", "fp16"], [256], ["nothing", "all"], marks=pytest.mark.slow),
        pytest.param(["bf16"], [128, 256], ["nothing", "all"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_they_compile_for_cards_and_fit_their_shared_memory(
    kinds: list[str], widths: list[int], asked: list[str]
) -> None:
    """For Ampere and Hopper, without such a card, as they are called: with everything asked for, and with nothing.

    Then, where a query sees keys in a row, a tile is loaded while the one before it is computed.
    """
    env = {**os.environ, gpu.INTERPRETED: "0"}
    command = [sys.executable, "-c", COMPILED, repr(kinds), repr(widths), repr(asked)]
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-3000:]
    rows = [line.split() for line in told.stdout.splitlines()]
    assert len(rows) == 22 * len(kinds) * len(widths) * len(asked)
    for name, *_, what, shared, loads in rows:
        assert int(shared) <= ROOM, (name, _, what, shared)
        if what == "nothing" and name in MEANWHILE and kinds != ["fp32"]:
            assert int(loads) > 0, (name, _, what)
