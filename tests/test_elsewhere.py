"""Laws on a device that is not the CPU: on one that is not there, which refuses to meet the CPU's tensors."""

from __future__ import annotations

import warnings
from subprocess import CompletedProcess

import pytest

from . import apart, elsewhere

SKIPPED = "-composes", "-is_documented"
MORE = ["TempScale", "ACT", "KNorm", "SpargeAttn"]  # scores, moved weight, cache, mask


def tried(*words: str) -> CompletedProcess[str]:
    """In a process of its own, since torch is told of the device for good."""
    return apart.said(_tried, *words)


def _tried(*words: str) -> int:
    warnings.simplefilter("ignore")
    return elsewhere.main(*words)


@pytest.mark.parametrize("names", [["SinkRate"], pytest.param(MORE, marks=pytest.mark.slow)], ids=" ".join)
def test_methods_keep_the_laws_there(names: list[str]) -> None:
    told = tried(*SKIPPED, *names)
    assert told.returncode == 0, told.stdout + told.stderr[-3000:]


def test_a_method_that_makes_a_tensor_on_the_cpu_is_found_out() -> None:
    told = tried("--careless")
    assert told.returncode == 1
    assert "expected all tensors to be on the same device" in told.stdout
    assert told.stdout.count("Careless") >= 3
