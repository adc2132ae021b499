"""Random problems for the native kernel, whatever its build: python -m benchmarks.reliability.problems FIRST COUNT.

Each is computed with one thread and with several, bit for bit, and beside the reference in float64.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from heedful import native
from heedful.core.mask import Blocks, First, Rule, Where, Window
from heedful.core.summary import PARTS, Summary
from heedful.kit.chosen import Chosen

ROOT = Path(__file__).parents[2]
PIECE = 250  # problems of one process
BUILD = ("-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi", "-fno-math-errno")
CHECKS = ("-ffp-contract=fast", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
WAYS = ("to queries", "to keys", "to values")
SEVERAL, EXACT = "other bits with several threads", "further from float64 than the reference's error allows"


@dataclass(frozen=True)
class Problem:
    """What is asked of the kernel, all drawn from one number."""

    number: int

    @cached_property
    def draw(self) -> random.Random:
        return random.Random(self.number)

    def complaints(self) -> Counter[str]:
        """What is wrong with the kernel's answer; the path that was taken is counted too."""
        kernel = native.library()
        if isinstance(kernel, str):
            raise SystemExit(kernel)
        path = self.draw.choice(kernel.paths)
        ask = self._flat if self.draw.random() < 0.1 else self._whole
        with on_path(path):
            return ask() + Counter({f"on {path}": 1})

    def _whole(self) -> Counter[str]:
        """Queries and keys in a tensor each, of any shape, under any mask and whatever else there is."""
        from tests import kernel_calls as calls

        draw = self.draw
        g = draw.choice((1, 1, 2, 3))
        h, b = g * draw.choice((1, 1, 2, 3, 4)), draw.choice((1, 1, 2))
        n = draw.choice((1, 1, draw.randint(2, 40), draw.randint(2, 200)))
        m = n + draw.choice((0, 0, draw.randint(0, 60), draw.randint(0, 700)))
        d, e = (draw.choice((1, 8, 16, 33, 64, 80, draw.randint(1, 130))) for _ in range(2))
        shape = (b, h, g, n, m, d, e)
        rules, blocks = self._rules(shape)
        pad = torch.tensor([draw.randint(0, m - 1) for _ in range(b)]) if draw.random() < 0.2 and not blocks else None
        kind = torch.bfloat16 if draw.random() < 0.4 else torch.float32
        q, k, v = (x.to(kind) for x in calls.draw(shape, self.number))
        q = q * draw.choice((1.0, 1.0, 1.0, 0.0, 8.0, 64.0))
        call = replace(calls.a_call(shape, rules, pad), softcap=draw.choice((None, None, None, 2.0, 30.0)))
        made = torch.Generator().manual_seed(self.number)
        sink = 2 * torch.randn(1, h, 1, 1, generator=made) if draw.random() < 0.2 else None
        bias = calls.a_bias(shape, draw.choice(calls.BIASES)) if draw.random() < 0.2 else None
        return self._asked((q, k, v), call, sink, bias)

    def _rules(self, shape: tuple[int, ...]) -> tuple[tuple[Rule, ...], bool]:
        from tests import kernel_calls as calls

        draw, (b, h, g, n, m, *_) = self.draw, shape
        if draw.random() < 0.15:
            size, heads = draw.choice((32, 64)), draw.choice((1, g, h))
            made = torch.Generator().manual_seed(self.number)
            table = torch.rand(b, heads, -(-n // size), -(-m // size), generator=made) < 0.5
            return (*calls.CAUSAL, Blocks(table, size)), True
        if n == 1 and draw.random() < 0.3:
            made = torch.Generator().manual_seed(self.number)
            table = torch.rand(draw.choice((1, b)), draw.choice((1, h)), 1, m, generator=made) < draw.random()
            return (*calls.CAUSAL, Chosen(lambda rows: table)), False
        wide, first = draw.randint(1, 300), draw.randint(1, 9)
        others: list[tuple[Rule, ...]] = [
            *calls.RULES.values(), (*calls.CAUSAL, Window(wide)), (*calls.CAUSAL, Window(wide) | First(first)),
            (Where(lambda q, k: q + k < wide),),
        ]  # fmt: skip
        return draw.choice(others), False

    def _flat(self) -> Counter[str]:
        """A decode step over heads of unlike length, which lie one behind another."""
        from tests import test_native_flat as flat

        draw = self.draw
        g = draw.choice((1, 2, 3))
        counts = tuple(draw.choice((0, 1, draw.randint(0, 80), draw.randint(0, 1400))) for _ in range(2 * g))
        counts = counts if any(counts) else (3, *counts[1:])
        kind = draw.choice((torch.float32, torch.bfloat16))
        q, k, v, call = flat.flat_step(counts, (g * draw.choice((1, 2, 5)), g), kind)
        return self._asked((q, k, v), call, None, None, ("received", "entropy", "peak"))

    def _asked(
        self, given: tuple[Tensor, ...], call: Any, sink: Any, bias: Any, parts: tuple[str, ...] = PARTS
    ) -> Counter[str]:
        from heedful.conformance.tolerances import unit, within_budget
        from tests import kernel_calls as calls
        from tests import test_native_flat as flat

        asks = calls.Everything if parts == PARTS else flat.Columns
        listens = self.draw.random() < 0.7
        back = self.draw.random() < 0.4 and given[0].shape[2] > 1 and given[0].dtype == torch.float32

        def answer(backend: str, threads: int, wide: bool = False) -> dict[str, Tensor]:
            torch.set_num_threads(threads)
            heard: list[Summary] = []
            tensors = [x.double() for x in given] if wide else given
            method = asks(heard) if listens else calls.Same()
            tensors = [x.detach().requires_grad_() for x in tensors] if back else tensors
            q, k, v = tensors
            heads = calls.run(backend, method, q, k, v, call, sink, bias)
            told = {part: x for part in parts if heard and isinstance(x := getattr(heard[0], part), Tensor)}
            if back:
                told |= dict(zip(WAYS, calls.back(heads, tensors, call), strict=True))
            return {"heads": heads.detach()} | told

        try:
            one, many = answer("native", 1), answer("native", self.draw.randint(2, 4))
            eager, exact = answer("reference", 1), answer("reference", 1, wide=True)
        finally:
            torch.set_num_threads(1)
        found: Counter[str] = Counter()
        steep = largest(given[0], given[1], call, bias)
        torchs = ("carried",) if given[0].shape[2] == 1 else ()  # drawn from the weights by a product of torch's
        of_scores = torch.finfo(torch.float32).eps * (steep if steep > 1 else 0.0)
        for part, x in one.items():
            if part not in torchs and not torch.equal(x.nan_to_num(), many[part].nan_to_num()):
                found[SEVERAL] = 1
            here = seen(call, part, x)
            own = unit(x[here]) if x.dtype == torch.bfloat16 else 0.0
            more = own + (pull(given, call, float(exact[part].abs().max()), of_scores) if part in WAYS else of_scores)
            near = part == "place" or within_budget(x[here].float(), eager[part][here].float(), exact[part][here], more)
            if not near:
                found[EXACT] = 1
        return found


def pull(given: tuple[Tensor, ...], call: Any, size: float, of_scores: float) -> float:
    """A rounding of a gradient: of its size as of the scores, and of what is taken from one another on the way."""
    q, k, v = (float(x.norm(dim=-1).max()) for x in given)
    return of_scores * size + torch.finfo(torch.float32).eps * float(call.scale) * v * max(q, k)


def largest(q: Tensor, k: Tensor, call: Any, bias: Tensor | None) -> float:
    """How large a score can be, by the lengths of queries and keys."""
    lengths = [float(x.float().norm(dim=-1).max()) for x in (q, k)]
    added = 0.0 if bias is None else float(bias.abs().max())
    return min(lengths[0] * lengths[1] * call.scale, call.softcap or float("inf")) + added


def seen(call: Any, part: str, x: Tensor) -> Tensor:
    """Where the answer means anything: rows of text."""
    if part in ("received", "distance", "seen", *WAYS):
        return torch.ones_like(x, dtype=torch.bool)
    rows = call.is_text
    if part == "heads":
        return rows[..., None].expand(x.shape)
    return rows.mT.expand(x.shape) if part == "carried" else rows.expand(x.shape)


@contextmanager
def on_path(path: str) -> Iterator[None]:
    """A `with` in which the kernel runs on one instruction set."""
    from heedful.engine.backends import native as backend

    kernel = replace(native.library(), path=path)  # type: ignore[type-var]
    with patch.object(backend, "library", lambda: kernel):
        yield


def sanitizing(folder: Path) -> dict[str, str]:
    """The kernel built with the address and undefined-behaviour sanitizers: what a process needs to run it."""
    library = folder / "kernel.so"
    source = Path(native.__file__).parent / "kernel.cpp"
    subprocess.run(["g++", *BUILD, *CHECKS, str(source), "-o", str(library)], check=True)
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {"LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": "detect_leaks=0", native.FILE_VARIABLE: str(library)}


def main(first: int, count: int) -> None:
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    for number in range(first, first + count):
        told = Problem(number).complaints()
        found += told
        for what in (SEVERAL, EXACT):
            if told[what]:
                print(f"problem {number}: {what}", file=sys.stderr, flush=True)
    print(json.dumps(found))


def asked(first: int, count: int, told: dict[str, str]) -> tuple[Counter[str], int]:
    """What some problems gave in a process of their own, and how often that ended before it was done."""
    words = [sys.executable, "-m", "benchmarks.reliability.problems", str(first), str(count)]
    env = {**os.environ, **told, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stderr[-4000:], end="", flush=True)
    return (Counter(), 1) if done.returncode else (Counter(json.loads(done.stdout.splitlines()[-1])), 0)


def sanitized(count: int, before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """So many problems more, under the sanitizers; what was found so far after each piece of them."""
    found = Counter({f"on {x}": n for x, n in before.get("problems on each path", {}).items()})
    found += Counter({what: before.get(what, 0) for what in (SEVERAL, EXACT)})
    done, ended = before.get("problems", 0), before.get("reports of a sanitizer, or a process that died", 0)
    with tempfile.TemporaryDirectory() as home:
        told = sanitizing(Path(home))
        for first in range(done, done + count, PIECE):
            size = min(PIECE, done + count - first)
            more, died = asked(first, size, told)
            found, ended = found + more, ended + died
            print(f"{first + size} problems, {ended} reports, {dict(found)}", flush=True)
            yield {
                "problems": first + size,
                "reports of a sanitizer, or a process that died": ended,
                **{what: found[what] for what in (SEVERAL, EXACT)},
                "problems on each path": {x.removeprefix("on "): n for x, n in found.items() if x.startswith("on ")},
            }


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
