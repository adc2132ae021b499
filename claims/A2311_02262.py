"""PASTA: does turning down the rest of a prompt, in heads found by profiling, make a model say what is marked?"""

from __future__ import annotations

from functools import cache

from claims._marked import language_model, prompts, score
from claims.ledger import Claim, run
from heedful import fit
from heedful.core.stack import Stack
from heedful.methods.intervene.language.pasta import PASTA

PROMPTS, LEARN = 12, 3
LAYERS = tuple(range(1, 30, 3))
KEEP = 10


@cache
def profiled() -> PASTA:
    """Once for the model, as in the paper, on prompts of its own."""
    batches = [item.batch for item in prompts(99, LEARN)]
    return fit(PASTA(keep=KEEP, layers=LAYERS), language_model().model, batches)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    asked, method = prompts(seed, PROMPTS), profiled()
    ways = {"without": Stack(), "PASTA": method, "every head of these layers": PASTA().on(layers=LAYERS)}
    numbers: dict[str, float] = {"heads": float(len(method.heads or ()))}
    for name, way in ways.items():
        numbers[f"log-probability, {name}"], numbers[f"beats the other, {name}"] = score(asked, way)
    numbers["log-probability, another place marked"], _ = score(asked, method, elsewhere=True)
    return numbers["log-probability, PASTA"] - numbers["log-probability, without"], numbers


CLAIM = Claim(
    key="2311.02262",
    method="PASTA",
    says="Steering a small set of heads, found by profiling, towards marked parts of a prompt makes a model follow "
    "them.",
    paper_number="22% higher accuracy on average over 4 tasks (Llama-7B)",
    setup=f"SmolLM2-135M; {PROMPTS} prompts in which two of 8 lines give a thing different codes and one of them is "
    f"marked; alpha 0.01 in the best {KEEP} of the 90 heads of every third layer, profiled one by one on {LEARN} other "
    "prompts. Every head of these layers and another marked place as controls.",
    effect="gain in log-probability of the code that the marked line gives",
    measure=measure,
    seeds=3,
    strong=0.1,
)

if __name__ == "__main__":
    run(CLAIM)
