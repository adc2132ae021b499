"""Grafting: can the most local layers be given a window at less harm than the others?"""

from __future__ import annotations

from typing import Any

from torch import Generator, no_grad, randperm

from claims._sparse import language_model, loss, own_text
from claims.ledger import Claim, run
from heedful import attach
from heedful.core.method import Part
from heedful.methods import Grafting, SinkWindow

TOKENS, SHARE, BAND, DRAWS = 400, 0.5, 32, 2
WINDOW = SinkWindow(4, BAND + 1)  # the query itself counts, and a language model's sinks stay


def swapped(text: dict[str, Any], layers: tuple[int, ...]) -> float:
    """The loss where these layers have a window, as they are."""
    part: Part = WINDOW.on(layers=layers)
    return loss(text, part)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    text, other = own_text(seed, TOKENS), own_text(seed, TOKENS, fitting=True)
    with no_grad(), attach(language_model().model, Grafting(BAND)) as looking:
        looking(**other, use_cache=False)
        found = looking[Grafting(BAND)]
    local, every = found.most(SHARE), list(found.within)
    rest = tuple(layer for layer in every if layer not in local)
    numbers = {"loss, untouched": loss(text, None), "loss, most local": swapped(text, local)}
    numbers["loss, least local"] = swapped(text, rest)
    draw = Generator().manual_seed(seed)
    drawn = []
    for _ in range(DRAWS):
        chosen = randperm(len(every), generator=draw)[: len(local)].tolist()
        drawn.append(swapped(text, tuple(sorted(every[i] for i in chosen))))
    numbers["loss, drawn"] = sum(drawn) / DRAWS
    numbers["locality, most local"] = sum(found[layer] for layer in local) / len(local)
    numbers["locality, least local"] = sum(found[layer] for layer in rest) / len(rest)
    return numbers["loss, drawn"] - numbers["loss, most local"], numbers


CLAIM = Claim(
    key="P320",
    method="Grafting",
    says="Layers whose attention is local are those whose attention a window may replace.",
    paper_number="DiT-XL/2 with half of its attention replaced: FID 2.38 to 2.64, against 2.27 (abstract)",
    setup=f"SmolLM2 on {TOKENS} tokens of help texts, another text a seed, half of whose layers see 4 sinks and {BAND} "
    f"tokens back, without any teaching: the most local ones, by a text of other topics, against {DRAWS} draws of as "
    "many. The paper's model makes images, and is taught after the swap. Details: the least local layers.",
    effect="loss in nats a token with drawn layers, less that with the most local ones",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
