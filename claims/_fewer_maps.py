"""Attention with fewer maps on digits: one training a way and seed, for the three claims of one paper."""

from __future__ import annotations

from claims._lab import DIGITS, numbers
from heedful.methods import HalvedAttention, OptimisedAttention, SuperAttention

TOKENS = 37  # patches and the class token
WAYS = {
    "softmax": None,
    "optimised": OptimisedAttention(),
    "efficient": HalvedAttention(),
    "super": SuperAttention(TOKENS),
}
MARGIN = 0.02  # of softmax's accuracy: what we still call a match
SETUP = (
    f"The lab's digits, {DIGITS.steps} steps of a vision transformer of {DIGITS.layers} layers under "
    "softmax attention and under each of the paper's three; accuracy on another held-out third a seed."
)


def accuracies(seed: int) -> dict[str, float]:
    return numbers(WAYS, seed, "accuracy", course=DIGITS)


def match(way: str, seed: int) -> tuple[float, dict[str, float]]:
    """How much of softmax's accuracy less the margin is left."""
    found = accuracies(seed)
    return found[f"accuracy, {way}"] - (1 - MARGIN) * found["accuracy, softmax"], found
