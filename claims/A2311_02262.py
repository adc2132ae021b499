"""PASTA: does turning down the rest of a prompt, in heads found by profiling, make a model say what is marked?"""

from __future__ import annotations

from claims._loaded import default
from claims._marked import gain, prompts
from claims.ledger import Claim, run
from heedful import fit
from heedful.methods.intervene.language.pasta import PASTA

PROMPTS, LEARN = 12, 3
LAYERS = tuple(range(1, 30, 3))
KEEP = 10


def profiled(seed: int) -> PASTA:
    """On prompts of its own, other ones for each seed."""
    batches = [item.batch for item in prompts(1000 + seed, LEARN)]
    return fit(PASTA(count=KEEP, layers=LAYERS), default().model, batches)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    method = profiled(seed)
    effect, numbers = gain(prompts(seed, PROMPTS), method, {"every head of these layers": PASTA().on(layers=LAYERS)})
    return effect, numbers | {"heads": float(len(method.heads or ()))}


CLAIM = Claim(
    key="2311.02262",
    method="PASTA",
    says="Steering a small set of heads, found by profiling, towards marked parts of a prompt makes a model follow "
    "them.",
    paper_number="22% higher accuracy on average over 4 tasks (Llama-7B)",
    setup=f"SmolLM2-135M; {PROMPTS} prompts in which two of 8 lines give a thing different codes and one of them is "
    f"marked; alpha 0.01 in the best {KEEP} of the 90 heads of every third layer, profiled one by one on {LEARN} other "
    "prompts, other ones for each seed; against no edit and against another marked place, whichever is better. Every "
    "head of these layers in the details. (Measured before over 3 seeds, profiled once and against no edit: +1.03.)",
    effect="log-probability of the code that the marked line gives, over nothing or another place marked",
    measure=measure,
    strong=0.1,
)

if __name__ == "__main__":
    run(CLAIM)
