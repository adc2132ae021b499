"""VTrans: does noise on heads tell which of them can go?"""

from __future__ import annotations

import random
import statistics

from claims._tiny_lm import Trained, held_out_loss, shown
from claims.ledger import Claim, run
from heedful import fit, operate
from heedful.methods import PruneHeads, VTrans
from heedful.methods.compress.prune._pruner import HeadPruner

SHARE, LAYERS, HEADS, STEPS, DRAWS = 0.25, 4, 4, 200, 4


def measure(seed: int) -> tuple[float, dict[str, float]]:
    trained = Trained(None, seed, STEPS, LAYERS)
    trained.run.close()
    model = trained.model

    def left(how: HeadPruner) -> float:
        return held_out_loss(operate(model, how), 7000 + seed, rows=64)

    draw = random.Random(seed)
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    drawn = [
        PruneHeads(groups=tuple(draw.sample(every, round(SHARE * len(every)))), form="zeros") for _ in range(DRAWS)
    ]
    numbers = {
        "loss": held_out_loss(model, 7000 + seed, rows=64),
        "loss, by noise": left(fit(VTrans(SHARE, form="zeros", seed=seed), model, shown(9000 + seed))),
        "loss, by gradient": left(fit(PruneHeads(SHARE, form="zeros"), model, shown(9000 + seed))),
        "loss, at random": statistics.fmean(left(how) for how in drawn),
    }
    return numbers["loss, at random"] - numbers["loss, by noise"], numbers


CLAIM = Claim(
    key="P231",
    method="VTrans",
    says="Heads whose Gaussian masks are noise after training are those that can go.",
    paper_number="up to 70 % more compression than the state of the art, of BERT, RoBERTa and GPT-2",
    setup=f"A language model of bytes with {LAYERS} layers of {HEADS} heads, trained for {STEPS} steps a seed; "
    f"masks trained by 40 steps; loss on held-out text with {SHARE:.0%} of the heads silenced, those by noise against "
    f"as many at random ({DRAWS} draws). Detail: by the gradient, as PruneHeads.",
    effect="nats a byte that random heads cost more",
    measure=measure,
    seeds=6,
)

if __name__ == "__main__":
    run(CLAIM)
