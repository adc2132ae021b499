"""PyramidKV: does the same memory go further when early layers hold more of it?"""

from __future__ import annotations

from claims._cache import losses, questions
from claims.ledger import Claim, run
from heedful.core.method import Method
from heedful.methods.sparse.cache.pyramid_kv import PyramidKV
from heedful.methods.sparse.cache.snap_kv import SnapKV

BUDGET, WINDOW, KERNEL = 64, 8, 7


def measure(seed: int) -> tuple[float, dict[str, float]]:
    prompts = questions(seed)
    methods: dict[str, Method | None] = {
        "everything": None,
        "pyramid": PyramidKV(BUDGET, WINDOW, KERNEL),
        "even": SnapKV(BUDGET, WINDOW, KERNEL),
    }
    numbers = {
        f"loss, {name}": sum(losses(text, method) for text in prompts) / len(prompts)
        for name, method in methods.items()
    }
    return numbers["loss, even"] - numbers["loss, pyramid"], numbers


CLAIM = Claim(
    key="2406.02069",
    method="PyramidKV",
    says="Early layers need many entries and late ones few, so that a pyramid of budgets beats an even one.",
    paper_number="all of the full cache's performance at 12% of it; 20.5 points more than others on TREC at "
    "0.7% (abstract)",
    setup="SmolLM2-135M, six towns' numbers strewn over some 350 tokens of prose, one of them asked for at the end, "
    f"the cache cut to {BUDGET} entries of the average layer ({WINDOW} of them the window), and the loss of the "
    "answer's digits, against SnapKV, which has the same votes and as many entries in each layer.",
    effect="nats of loss per digit that the pyramid saves at equal memory",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
