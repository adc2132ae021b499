"""Where softmax parks on the first token: what claims about sinks and outliers have to be measured on.

A mechanism can remove only what is there, so each claim first asks softmax, in the mean over all seeds, for the fault
that it speaks of. What is removed at the price of the loss counts for nothing either.
"""

from __future__ import annotations

from functools import cache
from statistics import fmean

from claims._lab import LAB, numbers
from heedful.core.method import Method
from heedful.laboratory.backcopy import BackCopy

COURSE = BackCopy()
SEEDS = 8  # a training takes half a minute
MARGIN = 0.02  # of softmax's loss, as in the claim about sigmoid attention: what is no worse
FAULTS = {  # what softmax must show at the least for it to have the fault
    "resting": 0.3,  # the epsilon of the paper about sinks
    "kurtosis": 6.0,  # twice that of a normal curve
    "largest": 12.0,  # about twice what as many draws from a normal curve come to
}
NAMES = {
    "resting": "of its weight on the first token where nothing is to be copied",
    "kurtosis": "of kurtosis of what the attention block adds",
    "largest": "times the mean in the residual stream",
}
TOLD = ("loss", "copied", "8-bit", "resting", "sinks", "largest", "kurtosis")


@cache
def shown(fault: str) -> float:
    """How much of a fault softmax shows, the mean over seeds; a claim without it is about nothing."""
    found = fmean(LAB.record(COURSE, None, seed)[fault] for seed in range(SEEDS))
    if found < FAULTS[fault]:
        raise ValueError(f"softmax has {found:.3g} {NAMES[fault]}, and {FAULTS[fault]:g} is a fault: nothing to remove")
    return found


def beside(method: Method, seed: int, *faults: str) -> dict[str, float]:
    """All that is told of softmax, which must show the faults, and of a mechanism trained alike."""
    for fault in faults:
        shown(fault)
    return numbers({"softmax": None, type(method).__name__: method}, seed, *TOLD, course=COURSE)


def at_no_worse_loss(effect: float, method: Method, found: dict[str, float]) -> float:
    """An effect, or nothing in its place where it is a gain that was bought with more than so much of the loss."""
    dear = found[f"loss, {type(method).__name__}"] > (1 + MARGIN) * found["loss, softmax"]
    return min(effect, 0.0) if dear else effect


def parked_less(method: Method, seed: int) -> tuple[float, dict[str, float]]:
    """What softmax gives the first token where nothing is to be copied, beyond what a mechanism gives it there."""
    found = beside(method, seed, "resting")
    gain = found["resting, softmax"] - found[f"resting, {type(method).__name__}"]
    return at_no_worse_loss(gain, method, found), found


def setup(more: str, *faults: str) -> str:
    """The words about the training, with what is asked of softmax."""
    asked = " and ".join(f"{FAULTS[fault]:g} {NAMES[fault]}" for fault in faults)
    return (
        f"The lab's course of words that are copied behind triggers, {COURSE.steps} steps of {COURSE.rows} texts of "
        f"{COURSE.length} words, a layer of one head, {more}. Softmax must show the fault there, in the mean over "
        f"seeds, or the claim refuses to be measured: {asked}. A draw whose loss is more than {MARGIN:.0%} above "
        "softmax's counts as nothing removed, and what grew still counts. Fixed before its mechanism was trained."
    )
