"""Attention for GPUs, in Triton: what the CPU kernel of `heedful.native` gives."""

from __future__ import annotations

import os
from functools import cache

import torch

INTERPRETED = "TRITON_INTERPRET"  # triton's own switch: kernels run on the CPU, step by step, to be tested


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter; to be said before they are first imported."""
    return os.environ.get(INTERPRETED) == "1"


@cache
def missing() -> str:
    """Why no kernel can be had at all, or nothing."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed; torch's builds for CUDA and ROCm bring it along"
    return ""


def why_not(device: torch.device) -> str:
    """Why no kernel runs on a device, or nothing."""
    if missing():
        return missing()
    if device.type == "cuda" or (device.type == "cpu" and interpreted()):
        return ""
    return f"it runs on GPUs, and this call is on {device} ({INTERPRETED}=1 lets it run on the CPU, to be tested)"
