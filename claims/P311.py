"""TurboBoA: is it what outputs meet in attention that makes rounded weights better?"""

from __future__ import annotations

from torch import Tensor

from claims import P322
from claims._loaded import default
from claims.ledger import Claim, run
from claims.P027 import SHOWN, TOKENS, UNSEEN, lost, unseen
from heedful.kit.rounding import damped
from heedful.methods import Absmax, TurboBoA
from heedful.methods.compress.quantise._calibrated import HANDED_ON, Calibrated, Lesson
from heedful.methods.compress.quantise._calibrated import SHOWN as OF_LAYER
from heedful.methods.compress.quantise.turbo_boa import Problem, inputs_of

BITS = 2
LAYERS = (12,)


class _Alike(Calibrated):
    """The same grids, corrections and refinement, each projection by its own inputs alone, as GPTQ sees it."""

    paper = TurboBoA.paper
    turns = TurboBoA.turns

    def learned(self, lesson: Lesson) -> dict[str, Tensor]:
        how, found = TurboBoA(self.bits), {}
        (of_layer, of_heads) = inputs_of(lesson, (OF_LAYER, HANDED_ON))
        for letter, x in lesson.matrices().items():
            inputs, lack = of_heads if letter == "o" else of_layer
            found[letter] = how.solved(Problem(x[None], damped(inputs), how.lack * lack))[0]
        return found


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = {
        "loss": P322.loss(default().model, unseen(seed)),
        "loss, nearest": lost(Absmax(BITS, layers=LAYERS), seed),
        "loss, by inputs alone": lost(_Alike(BITS, layers=LAYERS), seed),
        "loss, by what outputs meet": lost(TurboBoA(BITS, layers=LAYERS), seed),
    }
    return numbers["loss, by inputs alone"] - numbers["loss, by what outputs meet"], numbers


CLAIM = Claim(
    key="P311",
    method="TurboBoA",
    says="Rounding that knows what queries, keys and values meet in attention is better than a layer-wise one.",
    paper_number="none in the abstract; better than BoA and over three times as fast",
    setup=f"SmolLM2-135M-Instruct, attention's projections of one of 30 layers in {BITS} bits, fitted to "
    f"{SHOWN} texts of {TOKENS} tokens of Python's documentation a seed; loss on {UNSEEN} others of "
    f"{P322.TOKENS}, against the same with each projection judged by its inputs alone. Detail: the nearest values.",
    effect="nats a token that projections judged by their inputs alone lose more",
    measure=measure,
    seeds=5,
)

if __name__ == "__main__":
    run(CLAIM)
