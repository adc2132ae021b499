"""AdaKV: does the same memory go further when a layer's heads share it by need?"""

from __future__ import annotations

from claims._cache import losses, questions
from claims.ledger import Claim, run
from heedful.core.method import Method
from heedful.methods.sparse.cache.ada_kv import AdaKV
from heedful.methods.sparse.cache.snap_kv import SnapKV

BUDGET, WINDOW, KERNEL = 48, 16, 7


def measure(seed: int) -> tuple[float, dict[str, float]]:
    prompts = questions(seed)
    methods: dict[str, Method | None] = {
        "everything": None,
        "shared": AdaKV(BUDGET, WINDOW, KERNEL),
        "even": SnapKV(BUDGET, WINDOW, KERNEL),
    }
    numbers = {
        f"loss, {name}": sum(losses(text, method) for text in prompts) / len(prompts)
        for name, method in methods.items()
    }
    return numbers["loss, even"] - numbers["loss, shared"], numbers


CLAIM = Claim(
    key="2407.11550",
    method="AdaKV",
    says="Heads need unlike numbers of entries, so that sharing a layer's budget by votes beats an even one.",
    paper_number="better than even budgets on 29 data sets of Ruler and LongBench (abstract: substantial improvements)",
    setup="SmolLM2-135M, six towns' numbers strewn over some 350 tokens of prose, one of them asked for at the end, "
    f"the cache cut to {BUDGET} entries of the average head ({WINDOW} of them the window), and the loss of the "
    "answer's digits, against SnapKV, which has the same votes and as many entries in each head. A layer has three "
    "key heads.",
    effect="nats of loss per digit that sharing among heads saves at equal memory",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
