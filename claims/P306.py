"""GACT: do a few directions, of which a probe chooses one, steer better than their mean?"""

from __future__ import annotations

import random
from typing import Any

import torch

from claims._loaded import default
from claims.ledger import Claim, run
from heedful import attach, fit
from heedful.core.method import Method, Scoped
from heedful.methods.intervene.language.g_act import GACT
from heedful.methods.intervene.language.steering_vector import SteeringVector

LAYER, SHOWN, FITTED, ASKED = 24, 4, 8, 8  # where it acts; examples before a word; words of each task
TASKS = {
    "capitals": {
        "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo",
        "Greece": "Athens", "Russia": "Moscow", "Poland": "Warsaw", "Austria": "Vienna", "Ireland": "Dublin",
        "Norway": "Oslo", "Sweden": "Stockholm", "Portugal": "Lisbon", "Cuba": "Havana", "Kenya": "Nairobi",
        "Peru": "Lima", "Iran": "Tehran", "Iraq": "Baghdad", "China": "Beijing",
    },
    "opposites": {
        "hot": "cold", "big": "small", "fast": "slow", "rich": "poor", "old": "new", "wet": "dry", "high": "low",
        "long": "short", "hard": "soft", "dark": "light", "strong": "weak", "full": "empty", "open": "closed",
        "happy": "sad", "early": "late", "good": "bad", "young": "old", "loud": "quiet", "wide": "narrow",
        "clean": "dirty",
    },
}  # fmt: skip


def _ids(text: str) -> torch.Tensor:
    return torch.tensor([default().tokenizer(text).input_ids])


def _right(word: str, answer: str, what: Method | Scoped | None) -> float:
    """The log-probability of a word's answer, without an example."""
    model, first = default().model, default().tokenizer(f" {answer}").input_ids[0]
    with torch.no_grad():
        if what is None:
            logits = model(input_ids=_ids(f"{word} ->")).logits
        else:
            with attach(model, what) as run:
                logits = run(input_ids=_ids(f"{word} ->")).logits
    return float(logits[0, -1].log_softmax(-1)[first])


def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw = random.Random(seed)
    batches: list[dict[str, Any]] = []
    asked: list[tuple[str, str, str]] = []
    for task, pairs in TASKS.items():
        words = draw.sample(sorted(pairs), len(pairs))
        for word in words[:FITTED]:
            shown = draw.sample([x for x in words[:FITTED] if x != word], SHOWN)
            before = "".join(f"{x} -> {pairs[x]}\n" for x in shown)
            batches.append({"input_ids": _ids(f"{before}{word} ->"), "positive": True})
            batches.append({"input_ids": _ids(f"{word} ->"), "positive": False})
        asked += [(task, word, pairs[word]) for word in words[FITTED : FITTED + ASKED]]
    model = default().model
    ways: dict[str, Method | Scoped | None] = {
        "nothing": None,
        "one vector": fit(SteeringVector(), model, batches).on(layers=LAYER),
        "two directions": fit(GACT(), model, batches).on(layers=LAYER),
    }
    numbers: dict[str, float] = {}
    for name, what in ways.items():
        found = [(task, _right(word, answer, what)) for task, word, answer in asked]
        numbers[f"log-probability, {name}"] = sum(x for _, x in found) / len(found)
        for task in TASKS:
            mine = [x for which, x in found if which == task]
            numbers[f"{task}, {name}"] = sum(mine) / len(mine)
    return numbers["log-probability, two directions"] - numbers["log-probability, one vector"], numbers


CLAIM = Claim(
    key="P306",
    method="GACT",
    says="Directions that are clustered, and chosen by a probe for each prompt, steer more surely than one.",
    paper_number="+15 % of probe accuracy over ACT in LLaMA-3.2 3B, +61.5 % in layers 0 to 6, on code in C++",
    setup=f"SmolLM2-135M-Instruct, layer {LAYER} of 30. Two tasks, capitals and opposites: what is added is what "
    f"{SHOWN} examples of a task change at a word's arrow, learned from {FITTED} words of each task, tasks not told "
    f"apart; {ASKED} other words of each are asked without an example, drawn for each seed "
    "from twenty of which seeds share some. Two directions chosen by "
    "the probe against the one mean vector of the same pairs. No code is written here. (Layer 12, begun with, is where "
    "one vector gains nothing; the layer is the one of six where it gains most, on a draw of words that is not among "
    "these. In layer 12 two directions had 0.24 nats less on that draw.)",
    effect="log-probability of the answer with two directions above that with one vector, in nats",
    measure=measure,
    strong=0.1,
)

if __name__ == "__main__":
    run(CLAIM)
