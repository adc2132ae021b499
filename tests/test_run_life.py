"""The life of a run: what may end it at any moment, and what must not outlive it."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from heedful import attach
from heedful.adapters.kvcache import held_layer, serve
from heedful.conformance.model_laws import fingerprint
from heedful.tiny import tiny

from .samples import Gate, Scale


@pytest.fixture
def model() -> nn.Module:
    return tiny("llama")


def interrupted(at: int, act: Callable[[], Any]) -> bool:
    """Whether `act` was interrupted at its line number `at`, counted over heedful's frames."""
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if "heedful" not in frame.f_globals.get("__name__", "") or "life" in frame.f_globals["__name__"]:
            return None
        if event == "line":
            seen += 1
            if seen == at + 1:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_in_close_leaves_nothing_that_closing_again_does_not_take(model: nn.Module) -> None:
    before, at, go_on = fingerprint(model), 0, True
    while go_on:
        run = attach(model, Scale() | Gate())
        go_on = interrupted(at, run.close)
        run.close()
        assert fingerprint(model) == before, at
        at += 1
    assert at > 20


@pytest.mark.slow
def test_an_interrupt_in_attach_leaves_no_trace() -> None:
    model = tiny("llama", num_hidden_layers=1)
    before, at = fingerprint(model), 0
    while interrupted(at, lambda: attach(model, Gate())):
        assert fingerprint(model) == before, at
        at += 1
    assert at > 100


def test_a_model_dropped_without_closing_is_freed() -> None:
    model = tiny("llama")
    attach(model, Scale())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_layer_number_below_zero_names_no_layer_of_a_cache() -> None:
    """Zamba2's shared attention says -1."""
    cache, x = DynamicCache(), torch.ones(1, 1, 1, 1)
    serve(cache, -1)
    serve(None, -1)
    assert held_layer(cache, -1, x, x, "shared") is None
