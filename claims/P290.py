"""Activator: does a gate of channels, which mixes no tokens, name digits as well as attention does?"""

from __future__ import annotations

from claims._lab import DIGITS, numbers
from claims._pooled import BEFORE, END
from claims.ledger import Claim, run
from heedful.methods import Activator, NoMixing

MARGIN = 0.02  # of attention's accuracy, as in other claims of a match: what we still call one


WAYS = {
    "attention": END,
    "Activator": Activator().on(layers=BEFORE) | END,
    "without norms": NoMixing().on(layers=BEFORE) | END,
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "accuracy", "shifted", course=DIGITS)
    return found["accuracy, Activator"] - (1 - MARGIN) * found["accuracy, attention"], found


CLAIM = Claim(
    key="P290",
    method="Activator",
    says="A vision transformer with a normed gate of channels in attention's place is as good as with attention.",
    paper_number="CIFAR-10 73.2 % against a ViT's 65.7 %, CIFAR-100 46.1 % against 34.9 %",
    setup=f"The lab's digits, {DIGITS.steps} steps of a vision transformer of {DIGITS.layers} layers, whose last "
    "hands every token the mean of all, as the authors' models end; before it attention, Activator, and a gate without "
    "norms of as many weights as attention. Accuracy on another held-out third a seed. A match is an accuracy at least "
    "98 % of attention's. The first run, not changed after it was seen.",
    effect="accuracy above 98 % of attention's",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
