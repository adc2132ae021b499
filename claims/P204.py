"""SparseMM: does a cache shared by what heads look at hold more of an image than an even one?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._pictures import WORDS
from claims._sight import PATCHES, asked, log_probability, model, share_right
from claims.ledger import Claim, run
from heedful import Stack, attach, fit
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.methods import SnapKV, SparseMM
from heedful.methods.sparse.cache._voted import VotedCache

PICTURES, NOISE = 150, 0.3
BUDGET, WINDOW = 9, 1  # entries a head of the prompt's 66


@torch.no_grad()
def second(inputs: dict[str, Tensor], first: Tensor, other: Tensor, method: VotedCache | None) -> Tensor:
    """Logits of the answer to a second question, asked when the cache has been cut behind the first."""
    with attach(model(), Stack() if method is None else method) as seen:
        cache = cache_of(seen(**inputs, use_cache=True))
        seen(input_ids=first[:, None], **{CACHE: cache})
        return seen(input_ids=other[:, None], **{CACHE: cache}).logits[:, -1]


def measure(seed: int) -> tuple[float, dict[str, float]]:
    others = asked(10_000 + seed, PICTURES, NOISE)
    things = torch.zeros(others.inputs["input_ids"].shape, dtype=torch.bool)
    things[:, 1 : 1 + PATCHES] = others.things
    by_sight = fit(SparseMM(BUDGET, WINDOW, 1), model(), [{**others.inputs, "things": things}])
    item = asked(seed, PICTURES, NOISE)
    question = item.questions ^ 1  # of its colour the shape, of its shape the colour
    answer = item.words.gather(1, question[:, None])[:, 0]
    ways = {
        "plain": None, "SparseMM": by_sight, "even": SnapKV(BUDGET, WINDOW, 1),
        "random scores": SparseMM(BUDGET, WINDOW, 1, seed=seed),
    }  # fmt: skip
    found = {}
    for name, method in ways.items():
        logits = second(item.inputs, item.answers, len(WORDS) + question, method)
        found[f"log-probability, {name}"] = log_probability(logits, answer)
        found[f"right, {name}"] = share_right(logits, answer)
    best = max(found["log-probability, even"], found["log-probability, random scores"])
    return found["log-probability, SparseMM"] - best, found


CLAIM = Claim(
    key="P204",
    method="SparseMM",
    says="Heads that look at the thing they name need more of the cache, and sharing it so loses less than evenly.",
    paper_number="parity at 52 % less memory while it writes; under 5 % of heads are visual (abstract)",
    setup=f"A vision-language model of LLaVA's class with 0.3M parameters, {PICTURES} noisy 16 x 16 pictures of two "
    "things a seed, and two questions about one of them, its colour and its shape in either order. Behind the first "
    f"the cache is cut to {BUDGET} of 66 entries in the mean of 16 heads, {WINDOW} of them the newest; the right "
    "answer to the second is what counts. Scores come from as many other pictures. Against an even cut by the same "
    "votes and one by random scores, whichever is better.",
    effect="log-probability of the right answer, above the better control",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
