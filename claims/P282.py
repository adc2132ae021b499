"""dissociate: do recalled facts and drawn conclusions hang on heads of their own?"""

from __future__ import annotations

import random
from functools import cache

import torch

from claims.ledger import Claim, run
from heedful import models
from heedful.explaining import Ability, dissociate

PROMPTS, SILENCED = 32, 10  # of each ability, half of them to find heads by; heads of 270
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo",
    "Greece": "Athens", "Russia": "Moscow", "Poland": "Warsaw", "Austria": "Vienna", "Ireland": "Dublin",
    "Norway": "Oslo", "Sweden": "Stockholm", "Portugal": "Lisbon", "Cuba": "Havana", "Kenya": "Nairobi",
    "Peru": "Lima", "Iran": "Tehran", "Iraq": "Baghdad", "China": "Beijing", "Denmark": "Copenhagen",
    "Finland": "Helsinki", "Hungary": "Budapest", "Canada": "Ottawa", "Chile": "Santiago",
}  # fmt: skip
PHRASES = (  # one a seed
    "The capital of {} is", "The capital city of {} is", "The capital of the country {} is called",
    "As everybody knows, the capital of {} is", "The government of {} sits in its capital,",
    "Question: what is the capital of {}? Answer:", "We flew to the capital of {}, which is",
    "On the map of {} one finds the capital,",
)  # fmt: skip
KINDS = ("cat", "dog", "cow", "pig", "bear", "lion", "horse", "bird", "snake", "frog")
TRAITS = ("red", "blue", "green", "black", "white", "yellow", "cold", "warm", "soft", "loud", "happy", "quiet")
NAMES = ("Max", "Tom", "Anna", "Sam", "Bob", "Jack", "Emma", "Paul")


@cache
def _model() -> models.Loaded:
    return models.default()


def _ability(name: str, rows: list[tuple[str, str, str, str]]) -> Ability:
    """Prompts of one length each beside another, and the first tokens of what answers the one and the other."""
    tokenizer = _model().tokenizer
    clean, corrupt, right, wrong = zip(*rows, strict=True)
    texts = (torch.tensor([tokenizer(text).input_ids for text in column]) for column in (clean, corrupt))
    answers = (torch.tensor([tokenizer(f" {word}").input_ids[0] for word in column]) for column in (right, wrong))
    return Ability(name, *texts, *answers)


def _recall(seed: int, draw: random.Random) -> Ability:
    """Capitals, those of the second half of the prompts others than those of the first."""
    countries = draw.sample(sorted(CAPITALS), len(CAPITALS))
    rows = []
    for number in range(PROMPTS):
        half = countries[::2] if number < PROMPTS // 2 else countries[1::2]
        one, other = draw.sample(half, 2)
        texts = (PHRASES[seed].format(country) for country in (one, other))
        rows.append((*texts, CAPITALS[one], CAPITALS[other]))
    return _ability("recall", rows)


def _reasoning(draw: random.Random) -> Ability:
    """What follows for one of a kind from what is said of two kinds."""
    rows = []
    for _ in range(PROMPTS):
        kinds, traits, name = draw.sample(KINDS, 2), draw.sample(TRAITS, 2), draw.choice(NAMES)
        rules = " ".join(f"All {kind}s are {trait}." for kind, trait in zip(kinds, traits, strict=True))
        one, other = draw.sample((0, 1), 2)
        texts = (f"{rules} {name} is a {kinds[n]}. So {name} is" for n in (one, other))
        rows.append((*texts, traits[one], traits[other]))
    return _ability("reasoning", rows)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw = random.Random(seed)
    found = dissociate(_model().model, _recall(seed, draw), _reasoning(draw), count=SILENCED, draws=2)
    numbers = {f"lead, {name}": float(lead) for name, lead in zip(found.names, found.lead, strict=True)}
    for row, silenced in zip(found.lost.tolist(), found.figure.rows, strict=True):
        numbers |= {f"share of {name} lost without {silenced}": x for name, x in zip(found.names, row, strict=True)}
    for name, heads in zip(found.names, found.heads, strict=True):
        numbers[f"mean layer, heads of {name}"] = sum(layer for layer, _ in heads) / len(heads)
    return found.double, numbers


CLAIM = Claim(
    key="P282",
    method="dissociate",
    says="Recall and reasoning hang on circuits of their own: without those of one, that one suffers and the other "
    "does not.",
    paper_number="up to 15 % of accuracy in either direction, in Qwen and LLaMA",
    setup="SmolLM2-135M-Instruct; capitals of countries, in a phrase of its own for each seed, and conclusions from "
    f"two rules of which one applies, "
    f"{PROMPTS} prompts of each, half to find heads by and half to ask when {SILENCED} of 270 heads are silenced. A "
    "small model draws few conclusions: the lead of the right answer with all heads is in the details.",
    effect="share of the lead lost by an ability's own heads above that by the other's, the lower of the two",
    measure=measure,
    strong=0.15,
)

if __name__ == "__main__":
    run(CLAIM)
