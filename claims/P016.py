"""VAR: does weight taken from sinks and given to a marked passage make the model say what that passage says?"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from claims._marked import language_model, prompts, score
from claims.ledger import Claim, run
from heedful import fit
from heedful.methods.intervene.vision.var import VAR

PROMPTS = 12
LAYERS = range(1, 29)  # of 30; the first only looks for sinks, so that layers 2 to 28 act, as in the authors' code


@cache
def fitted() -> VAR:
    return fit(VAR(), language_model().model, [{"input_ids": item.tokens} for item in prompts(99, 4)])


def measure(seed: int) -> tuple[float, dict[str, float]]:
    asked, method = prompts(seed, PROMPTS), fitted()
    ways = {"without": None, "VAR": method, "every head": replace(method, rho=1.0, least=0.0)}
    numbers: dict[str, float] = {}
    for name, way in ways.items():
        part = None if way is None else way.on(layers=LAYERS)
        numbers[f"log-probability, {name}"], numbers[f"beats the other, {name}"] = score(asked, part)
    numbers["log-probability, another place marked"], _ = score(asked, method.on(layers=LAYERS), elsewhere=True)
    return numbers["log-probability, VAR"] - numbers["log-probability, without"], numbers


CLAIM = Claim(
    key="P016",
    method="VAR",
    says="Weight taken from sinks and given to the image, in heads that look at it, makes a model heed the image.",
    paper_number="gains on general, hallucination and vision tasks, without training",
    setup=f"SmolLM2-135M; {PROMPTS} prompts in which two of 8 lines give a thing different codes and one of them is "
    "marked; the authors' settings, massive dimensions fitted on 4 other prompts. Every head and another marked place "
    "as controls. No vision model was at hand.",
    effect="gain in log-probability of the code that the marked line gives",
    measure=measure,
    seeds=3,
    strong=0.1,
)

if __name__ == "__main__":
    run(CLAIM)
