"""SequentialAttention: are heads chosen one after another better than as many chosen at once by the same attention?"""

from __future__ import annotations

import statistics

import torch

from claims._tiny_lm import Trained, held_out_loss, shown
from claims.ledger import Claim, run
from heedful import fit, operate
from heedful.authoring import Fitted
from heedful.methods import PruneHeads, SequentialAttention
from heedful.methods.compress.prune._pruner import HeadPruner

SHARE, LAYERS, HEADS, STEPS, DRAWS = 0.5, 3, 4, 120, 4
EPOCHS = 4  # passes before each choice


def measure(seed: int) -> tuple[float, dict[str, float]]:
    trained = Trained(None, seed, STEPS, LAYERS)
    trained.run.close()
    model = trained.model

    def left(how: HeadPruner) -> float:
        return held_out_loss(operate(model, how), 14_000 + seed, rows=32)

    def ranked(number: int) -> HeadPruner:
        """Heads in an order that is drawn."""
        draw = torch.Generator().manual_seed(100 * seed + number)
        order = {str(layer): torch.rand(HEADS, generator=draw) for layer in range(LAYERS)}
        return PruneHeads(SHARE, form="zeros", importance=Fitted(order))

    stay = LAYERS * HEADS - round(SHARE * LAYERS * HEADS)
    ways = {
        "one by one": SequentialAttention(SHARE, form="zeros", epochs=EPOCHS, seed=seed),
        "at once": SequentialAttention(SHARE, form="zeros", at_once=stay, epochs=EPOCHS * stay, seed=seed),
        "by gradient": PruneHeads(SHARE, form="zeros"),
    }
    numbers = {"loss": held_out_loss(model, 14_000 + seed, rows=32)}
    numbers |= {f"loss, {name}": left(fit(how, model, shown(15_000 + seed))) for name, how in ways.items()}
    numbers["loss, at random"] = statistics.fmean(left(ranked(number)) for number in range(DRAWS))
    return numbers["loss, at once"] - numbers["loss, one by one"], numbers


CLAIM = Claim(
    key="P144",
    method="SequentialAttention",
    says="What attention chooses one after another, each given those chosen before, is chosen better than all at once.",
    paper_number="state of the art in choosing features on most of six data sets (table 1)",
    setup=f"A language model of bytes with {LAYERS} layers of {HEADS} heads, trained for {STEPS} steps a seed; loss on "
    f"held-out text with {SHARE:.0%} of the heads silenced, one of each layer always kept. Chosen one by one with "
    f"{EPOCHS} passes over 4 batches for each, against as many passes in all and one choice. In the details heads by "
    f"the gradient, as PruneHeads, and by {DRAWS} orders drawn. The paper chooses features, not heads.",
    effect="nats a byte that heads chosen at once cost more",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
