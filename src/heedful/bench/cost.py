"""What a contender costs: time to read a prompt and to go on from it, memory, cache, and the pairs it computes."""

from __future__ import annotations

import ctypes
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heedful.adapters.kvcache import cache_bytes
from heedful.adapters.wrapped import device_of
from heedful.bench.records import Cost
from heedful.facts import processor
from heedful.tasks.task import Item
from heedful.text_models import Contender, TextModel, text_model


def machine(device: torch.device) -> str:
    """What a measured time belongs to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return f"{name}, {torch.get_num_threads()} threads"


STEPS = 8  # tokens that follow the prompt
WARM_UP = 0  # the turn in which memory is measured; times of the others count


@torch.no_grad()
def cost(
    model: nn.Module, what: Contender | None, name: str, item: Item, turn: int, batch: int = 1, **how: Any
) -> Cost:  # fmt: skip
    """One measurement on one item's prompt, or on a batch of it alone.

    The warm-up turn measures memory: what is given back there costs time to get.
    """
    device = device_of(model)
    with text_model(model, what, replace(item.shown, looks=False), **how) as speaker:
        speaker.rows = batch
        resting = _reset_high_water(device) if turn == WARM_UP else None
        began = _now(device)
        logits = speaker.read(item.prompt)[-1]
        prefill = _now(device) - began
        peak = None if resting is None else max(0, _high_water(device) - resting)
        held = sum(map(cache_bytes, speaker.caches))
        steps = []
        for _ in range(STEPS if item.shown.goes_on else 0):
            began = _now(device)
            logits = speaker.go_on(int(logits.argmax()))
            steps.append(_now(device) - began)
        density, backends = _pairs(speaker, item)
    step = statistics.median(steps) if steps else None
    return Cost(name, item.read, machine(device), turn, prefill, step, peak, held, density, backends, batch)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _status(field: str) -> int:
    """One of Linux's memory counts of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field + ":"))


def _reset_high_water(device: torch.device) -> int | None:
    """Give free memory back and say how much is in use; None where this machine does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets the high-water mark
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _high_water(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _pairs(speaker: TextModel, item: Item) -> tuple[float | None, tuple[str, ...]]:
    """The share of the model's own pairs that were computed, where all of its layers read the whole prompt."""
    if speaker.run is None:
        return None, ()
    seen, tokens, reads = speaker.run.activity(), len(item.prompt), item.shown.reads
    backends = tuple(sorted(set(seen.backends.values())))
    whole = reads == "image" and all(len(call.keys) == tokens for call in speaker.run.state.calls.values())
    # of an encoder before a decoder, of merged patches, or of a picture whose places look at words
    if not seen.density or reads == "scene" or (item.shown.inputs and not whole):
        return None, backends
    own = 1.0 if whole else (tokens + 1) / (2 * tokens)
    narrowed = [share / own for share in seen.density.values()]
    return (sum(narrowed) + seen.layers - len(narrowed)) / seen.layers, backends
