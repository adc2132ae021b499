"""FocusDirections: do learned directions turn heads, and the answer, towards the relevant line among distractors?

The effect is the chosen heads' mean mass on held-out texts, which the fit raises on its own; the answer's
log-probability stands beside it in the record.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import normalize

from claims._loaded import default
from claims.ledger import Claim, run
from heedful import attach, fit
from heedful.authoring import Fitted
from heedful.core.method import Method
from heedful.methods.intervene.language.focus_directions import FocusDirections, _Mass

NAMES = "apple,river,stone,cloud,tiger,piano,candle,garden,bridge,winter,orange,silver,doctor,forest,window,basket"
WORDS = "red,blue,green,black,white,pink,brown,gold,gray,purple,yellow,blind,cold,warm,soft,loud"
LINES, LEARN, TEST, EPOCHS, RATE, HEAD_OUTPUT, ALPHA = 8, 8, 12, 4, 0.03, 10, 0.3


def example(draw: random.Random) -> tuple[dict[str, Any], int]:
    """Eight lines, a question about one of them, and the first token of its answer."""
    tokenizer = default().tokenizer
    names, words = (draw.sample(x.split(","), LINES) for x in (NAMES, WORDS))
    asked = draw.randrange(LINES)
    ids: list[int] = []
    for i, (name, word) in enumerate(zip(names, words, strict=True)):
        start = len(ids)
        ids += tokenizer(f"The code of the {name} is {word}.\n").input_ids
        if i == asked:
            span = (start, len(ids))
    ids += tokenizer(f"Question: what is the code of the {names[asked]}?\nAnswer: the code is").input_ids
    return {"input_ids": torch.tensor([ids]), "roles": {"relevant": (span,)}}, tokenizer(f" {words[asked]}").input_ids[
        0
    ]


def chosen_heads(directions: Fitted) -> list[tuple[int, int]]:
    """Layers and heads that a fit has given a direction."""
    return sorted((int(name[2:]), i) for name, d in directions.items() for i in range(len(d)) if d[i].any())


def random_like(directions: Fitted) -> Fitted:
    """Random directions of the same lengths in the same heads."""
    return Fitted(
        {name: normalize(torch.randn_like(d), dim=-1) * d.norm(dim=-1, keepdim=True) for name, d in directions.items()}
    )


def moved(directions: Fitted) -> Fitted:
    """As learned, in heads of the same layer that were not chosen."""
    out = {}
    for name, d in directions.items():
        chosen = [i for i in range(len(d)) if d[i].any()]
        others = [i for i in range(len(d)) if i not in chosen]
        places = torch.tensor(others, dtype=torch.long)[torch.randperm(len(others))[: len(chosen)]]
        out[name] = torch.zeros_like(d).index_copy(0, places, d[chosen[: len(places)]])
    return Fitted(out)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model = default().model
    draw = random.Random(seed)
    learn, test = ([example(draw) for _ in range(n)] for n in (LEARN, TEST))
    method = fit(FocusDirections(ALPHA, HEAD_OUTPUT, EPOCHS, RATE), model, [batch for batch, _ in learn])
    heads = chosen_heads(method.directions)

    @torch.no_grad()
    def score(part: Method | None) -> tuple[float, float]:
        """The chosen heads' mass on the line asked for, and the log-probability of its word."""
        reader = _Mass()
        right = 0.0
        with attach(model, reader if part is None else part | reader) as attached:
            for batch, answer in test:
                attached.roles = batch["roles"]
                logits = attached(input_ids=batch["input_ids"], logits_to_keep=1).logits
                right += float(logits[0, -1].log_softmax(-1)[answer]) / len(test)
            by_layer = attached[reader]
        return sum(float(by_layer[layer][i]) for layer, i in heads) / len(heads), right

    numbers: dict[str, float] = {}
    ways = {
        "none": None,
        "learned": method,
        "learned, turned away": replace(method, alpha=-ALPHA),
        "random directions": replace(method, directions=random_like(method.directions)),
        "learned, other heads": replace(method, directions=moved(method.directions)),
    }
    for name, part in ways.items():
        numbers[f"mass, {name}"], numbers[f"log-probability, {name}"] = score(part)
    return numbers["mass, learned"] - max(numbers["mass, none"], numbers["mass, random directions"]), numbers


CLAIM = Claim(
    key="P088",
    method="FocusDirections",
    says="Directions learned in the heads that attend to relevant text raise their attention to it.",
    paper_number="none given in the abstract",
    setup="SmolLM2-135M, a question about one of 8 lines; 10 heads (the paper: 20), 32 steps at rate 0.03 (the paper: "
    "10 epochs at 0.001), strength 0.3; 12 held-out texts; against no edit and random directions of the same lengths, "
    "the better of the two. What becomes of the answers stands in the details. (Judged before by the gain in the "
    "answers' log-probability over no edit alone, 3 seeds: +0.14, holds.)",
    effect="attention of the chosen heads on the line asked for, over the better control",
    measure=measure,
    strong=0.05,
)


if __name__ == "__main__":
    run(CLAIM)
