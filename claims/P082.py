"""A-VL: is a core of the image that is chosen anew worth more than one that stays?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._pictures import WORDS
from claims._sight import ROLES, asked, log_probability, model, share_right
from claims.ledger import Claim, run
from heedful import Stack, attach
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.core.method import Part
from heedful.methods import AVL

PICTURES, NOISE = 100, 0.3
KEPT, CORE, EVERY = 1.0, 0.1, 3
TURNS = (1, 2, 3)  # the questions that follow the first, counted from it: its thing's other word, the other thing


class _Stays(AVL):
    """The control: the same steps see all, and the core stays what it first was."""

    def choose(self, score: Tensor, before: Tensor | None) -> Tensor:
        return super().choose(score, None) if before is None else before


@torch.no_grad()
def answered(seed: int, what: Part | Stack) -> tuple[Tensor, Tensor]:
    """Logits of the answer to the last question, and which is right."""
    item = asked(seed, PICTURES, NOISE)
    answer = item.answers
    with attach(model(), what, roles=ROLES) as seen:
        cache = cache_of(seen(**item.inputs, use_cache=True))
        for turn in TURNS:
            question = item.questions ^ turn
            seen(input_ids=answer[:, None], **{CACHE: cache})
            logits = seen(input_ids=len(WORDS) + question[:, None], **{CACHE: cache}).logits[:, -1]
            answer = item.words.gather(1, question[:, None])[:, 0]
    return logits, answer


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ways = {"plain": Stack(), "renewed": AVL(KEPT, CORE, EVERY), "once": _Stays(KEPT, CORE, EVERY)}
    found = {}
    for name, what in ways.items():
        logits, right = answered(seed, what)
        found[f"log-probability, {name}"] = log_probability(logits, right)
        found[f"right, {name}"] = share_right(logits, right)
    return found["log-probability, renewed"] - found["log-probability, once"], found


CLAIM = Claim(
    key="P082",
    method="AVL",
    says="What an image is looked at for changes while text is written, so a core that is chosen anew loses less.",
    paper_number="none given in the abstract: memory and load are cut without losing performance",
    setup=f"A vision-language model of LLaVA's class with 0.3M parameters, {PICTURES} noisy 16 x 16 pictures of two "
    "things a seed, and four questions with their answers between, two about one half and two about the other; the "
    f"last one counts. A step sees {CORE:.0%} of the patches, chosen by the first step and every {EVERY} steps after "
    "it, which falls on the third question. Against a core that is chosen once, where the same steps see all. All "
    "patches stay in the cache. The control was made stricter after a look.",
    effect="log-probability of the right answer, above that with a core chosen once",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
