"""The parts of `make gpu`: each goes through its rows until its time is up, and leaves out those that it has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.gpu.keeping import Kept, Room
from benchmarks.speed import cache
from benchmarks.speed.attention import Everything, Idle, ours, packed
from benchmarks.speed.sparse import Given
from heedful import attach
from heedful.core.call import Call
from heedful.core.mask import Blocks, Mask
from heedful.core.method import Method, Stack
from heedful.core.sites import Site, at
from heedful.gpu import blocks
from heedful.kit.chosen import Chosen
from heedful.methods import SinkWindow

SHARES = (0.1, 0.25, 0.5)  # of causal blocks
WINDOW = SinkWindow(4, 1024)


def flash(device: torch.device) -> AbstractContextManager[Any]:
    """On a card torch's own kernel must be flash attention, or the comparison is none."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else nullcontext()


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with flash(q.device):
        return sdpa(q, k, v, is_causal=causal, enable_gqa=True)


def kernels(kept: Kept, room: Room) -> None:
    """The kernels' tests without the interpreter, file by file; one that is stopped is tried again next time."""
    env = {**os.environ, "HEEDFUL_DEVICE": str(room.device)}
    env.pop("TRITON_INTERPRET", None)
    many = ["-n", "8"] if (os.cpu_count() or 1) >= 8 else []  # most of the time they are compiled
    for file in room.sizes.tests:
        if room.over or kept.has(tests=file, stopped=False):
            continue
        kept.rows = [row for row in kept.rows if row["tests"] != file]
        command = [sys.executable, "-m", "pytest", "-q", *many, file, *room.sizes.of_tests]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=room.left)
        except subprocess.TimeoutExpired:
            kept.add({"tests": file, "stopped": True, "outcome": "stopped, since its time was up", "failed": []})
            continue
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        outcome = (done.stdout or done.stderr).strip().splitlines()[-1]
        if done.returncode and not failed:
            failed = [file]  # it did not even begin
        kept.add({"tests": file, "stopped": False, "outcome": outcome, "failed": failed})


def laws(kept: Kept, room: Room) -> None:
    """The laws on the device, of methods from all rooms in turn."""
    from heedful.catalogue import entries, family
    from heedful.conformance import check
    from heedful.conformance import laws as all_laws

    names = list(entries())
    places: dict[str, int] = {}
    order = []
    for name in names:
        kind = family(entries()[name])
        places[kind] = places.get(kind, 0) + 1
        order.append((places[kind], name))
    only = room.sizes.laws or [law for law in all_laws() if law != "is_documented"]
    for _, name in sorted(order)[: room.sizes.methods]:
        if room.over:
            return
        if not kept.has(method=name):
            report = check(entries()[name], only, room.device)
            kept.add({"method": name, "kept": sum(x.outcome == "kept" for x in report),
                      "broken": {x.law: x.reason[:300] for x in report.broken}})  # fmt: skip


def draw(room: Room, n: int, m: int, batch: int = 1, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As models lay them out: tokens before heads."""
    h, g, d = room.sizes.shape
    made = (
        torch.randn(batch, length, heads, width or d, device=room.device, dtype=room.sizes.dtype).transpose(1, 2)
        for length, heads in ((n, h), (m, g), (m, g))
    )
    return tuple(made)  # type: ignore[return-value]


def tune(kept: Kept, room: Room) -> None:
    """Block sizes: each kind of kernel with sizes in turn; what is fastest goes into the package's table."""
    n = room.sizes.cache
    for width in room.sizes.tuned:
        q, k, v = draw(room, n, n, width=width)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        runs: dict[str, Callable[[], Any]] = {
            blocks.ROWS: ours(Everything(), "triton", q, k, v),
            blocks.BACK: partial(_there_and_back, leaves),
            blocks.STEP: ours(Idle(), "triton", q[:, :, -1:].contiguous(), k, v),
        }
        for kind, run in runs.items():
            if room.over:
                return
            if not kept.has(kind=kind, width=width) and (found := _fastest(kind, width, run, room)) is not None:
                kept.add({"kind": kind, "width": width, **found})


def _there_and_back(leaves: list[Tensor]) -> None:
    with torch.enable_grad():
        torch.autograd.grad(ours(Idle(), "triton", *leaves)().sum(), leaves)


def _fastest(kind: str, width: int, run: Callable[[], Any], room: Room) -> dict[str, Any] | None:
    """Sizes that do not fit the card's memory are left out. Nothing where time is up before all are compiled."""
    able: dict[str, Callable[[], Any]] = {"safe": run}
    for sizes in room.sizes.sizes:
        if room.over:
            return None
        table = {blocks.architecture(room.device): {kind: {str(width): list(sizes)}}}
        with_sizes = partial(_under, table, run)
        try:
            with_sizes()
            room.settle()
        except Exception as problem:  # noqa: BLE001 - Triton raises what it likes
            print(f"{kind} {width} {sizes}: {type(problem).__name__}", flush=True)
            continue
        able[str(list(sizes))] = with_sizes
    found = room.race(able)["found"]
    best = min(found, key=lambda name: float(found[name]["seconds"]))
    return {"best": None if best == "safe" else [int(x) for x in re.findall(r"\d+", best)], "found": found}


def _under(table: dict[str, Any], run: Callable[[], Any]) -> None:
    with mock.patch.object(blocks, "table", return_value=table):
        run()


def model_of(room: Room) -> Any:
    """Shaped like a model of a billion weights, which are random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = room.sizes
    heads, key_heads, width = s.shape
    config = LlamaConfig(
        hidden_size=heads * width, intermediate_size=s.inner, num_hidden_layers=s.layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, head_dim=width, vocab_size=s.vocabulary,
        max_position_embeddings=max(s.lengths), attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(room.device):
        return LlamaForCausalLM._from_config(config, dtype=s.dtype).eval()


def diagnose(kept: Kept, room: Room) -> None:
    """The default readers in one forward against a plain one, which computes the last logits alone as they do."""
    from heedful.diagnosis.measures import chosen, reads_text

    if all(kept.has(tokens=n) for n in room.sizes.lengths):
        return
    model = model_of(room)
    measures = Stack(tuple(part for part in chosen(None) if reads_text(part)))
    for n in room.sizes.lengths:
        if room.over:
            return
        ids = torch.randint(3, room.sizes.vocabulary, (1, n)).to(room.device)
        feed = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
        roles = {"delimiters": tuple((i, i + 1) for i in range(8, n, 16))}

        def plain(feed: dict[str, Any] = feed) -> None:
            with flash(room.device):
                model(**feed)

        def read(feed: dict[str, Any] = feed, roles: Any = roles, what: Stack = measures) -> None:
            with attach(model, what, backend="triton", roles=roles) as run:
                run(**feed)
            run.answers()

        if not kept.has(tokens=n):
            contenders = {
                "plain forward": plain,
                "default diagnose": read,
                "nothing to do": partial(read, what=Stack()),
            }
            kept.add({"tokens": n, **room.race(contenders)})


def table_of(room: Room, n: int, share: float) -> tuple[Blocks, float]:
    """Random blocks for each head, the diagonal among them, and the share of causal pairs that they hold."""
    heads, size = room.sizes.shape[0], room.sizes.block
    count = -(-n // size)
    picked = torch.rand(1, heads, count, count, device=room.device) < share
    picked |= torch.eye(count, dtype=torch.bool, device=room.device)
    below = picked.tril(-1).sum().item() / heads * size * size + n * (size + 1) / 2
    return Blocks(picked, size), below / (n * (n + 1) / 2)


def prefill(kept: Kept, room: Room) -> None:
    """Attention over chosen blocks and over a window, against dense flash attention; choosing is not part of it."""
    for n in room.sizes.prefill:
        if room.over or kept.has(tokens=n):
            continue
        q, k, v = draw(room, n, n)
        contenders: dict[str, Callable[[], Any]] = {
            "SDPA, dense": partial(dense, q, k, v, True), "triton, dense": ours(Idle(), "triton", q, k, v),
        }  # fmt: skip
        density = {"triton, dense": 1.0}
        for share in SHARES:
            rule, held = table_of(room, n, share)
            contenders[f"{share:.0%} of blocks"] = ours(Given(rule), "triton", q, k, v)
            density[f"{share:.0%} of blocks"] = round(held, 4)
        wide = WINDOW.window if n > WINDOW.window else n // 2
        contenders["sinks and a window"] = ours(SinkWindow(4, wide), "triton", q, k, v)
        density["sinks and a window"] = round((wide * n - wide * (wide - 1) / 2) / (n * (n + 1) / 2), 4)
        found = room.race(contenders)
        over = {name: round(found["found"][name]["ratio"] / x, 3) for name, x in density.items()}
        kept.add({"tokens": n, **found, "density": density, "over_density": over})


class Picks(Method):
    """Sees the keys that it was handed, of each head its own."""

    paper = Idle.paper
    rule: Chosen | None = field(default=None, repr=False, compare=False)

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        return mask if self.rule is None else mask & self.rule


def decode(kept: Kept, room: Room) -> None:
    """The attention of one step on a quarter of a cache: even, uneven, or that many keys chosen one by one."""
    n = room.sizes.cache
    for batch in room.sizes.batches:
        if room.over or kept.has(batch=batch):
            continue
        q, k, v = (x.contiguous() for x in draw(room, 1, n, batch))
        even, uneven = cache.cut(k, v, True), cache.cut(k, v, False)
        picked = torch.rand(batch, k.shape[1], 1, n, device=room.device) < 1 / cache.SHARE
        of_all = picked.repeat_interleave(q.shape[1] // k.shape[1], 1)
        rule = Chosen(lambda rows, of_all=of_all: of_all)
        contenders: dict[str, Callable[[], Any]] = {
            "SDPA, whole cache": partial(dense, q, k, v, False),
            "packed, whole cache": partial(packed, q, k, v),
            "triton, whole cache": ours(Idle(), "triton", q, k, v),
            "triton, a quarter": cache.alone(q, even, "triton"),
            "triton, an uneven quarter": cache.alone(q, uneven, "triton"),
            "triton, a quarter chosen one by one": ours(Picks(rule), "triton", q, k, v),
        }
        kept.add({"batch": batch, "tokens": n, **room.race(contenders, room.sizes.repeats)})


PARTS: dict[str, tuple[float, Callable[[Kept, Room], None]]] = {  # with their shares of the time
    "kernels": (0.25, kernels),
    "tune": (0.1, tune),
    "decode": (0.1, decode),
    "prefill": (0.15, prefill),
    "diagnose": (0.2, diagnose),
    "laws": (0.2, laws),
}
