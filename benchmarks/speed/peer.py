"""One peer's way to the same numbers, in its own environment: python peer.py NAME FOLDER TOKENS ROUNDS. Prints JSON.

What is asked of each: for every head, how much weight each key gets, and the entropy of each query's weights.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def two_numbers(weights: Any) -> tuple[Any, Any]:
    """Column sums and row entropies of a map `[b h q k]`."""
    return weights.sum(-2), torch.special.entr(weights).sum(-1)


def lens(folder: str, ids: Any) -> Callable[[], Any]:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(folder, device="cpu")

    def run() -> Any:
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))
        return [two_numbers(x) for name, x in cache.items() if name.endswith("hook_pattern")]

    return run


def nnsight(folder: str, ids: Any) -> Callable[[], Any]:
    from nnsight import LanguageModel  # its successor wants a task

    model = LanguageModel(folder, attn_implementation="eager", device_map="cpu", dispatch=True)

    def run() -> Any:
        found = []
        with model.trace(ids):
            for layer in model.model.layers:
                received, entropy = two_numbers(layer.self_attn.output[1])
                found.append((received.save(), entropy.save()))
        return found

    return run


def plain(folder: str, ids: Any) -> Callable[[], Any]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return lambda: model(input_ids=ids, use_cache=False)


def heedful(folder: str, ids: Any) -> Callable[[], Any]:
    from heedful import attach
    from heedful.authoring import Call, Method, Paper, Statistic, Sum, Summary, sums

    class TwoNumbers(Method):
        """What each key gets, and each row's entropy."""

        paper = Paper("X", "Two numbers", "A", 2026, "2601.00001")

        @sums("received", "entropy")
        def look(self, summary: Summary, call: Call) -> Statistic | None:
            received, entropy = summary.received, summary.entropy
            return None if received is None or entropy is None else Sum.of(torch.cat([received, entropy], -1))

    model = AutoModelForCausalLM.from_pretrained(folder)

    def run() -> Any:
        with attach(model, TwoNumbers()) as reading:
            reading(input_ids=ids, use_cache=False)
        return reading.state.statistics

    return run


def peak() -> float:
    """MB; getrusage would count what this process was forked from."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    name, folder, n, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    ids = torch.randint(100, 40000, (1, n), generator=torch.Generator().manual_seed(0))
    makers = {"plain": plain, "heedful": heedful, "transformer-lens": lens, "nnsight": nnsight}
    taken: list[float] = []
    with torch.no_grad():
        run = makers[name](folder, ids)
        run()
        for _ in range(rounds):
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
    told = {
        "seconds": round(statistics.median(taken), 3),
        "spread": [round(min(taken), 3), round(max(taken), 3)],
        "peak_mb": round(peak(), 1),
        "version": "" if name == "plain" else version(name),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
