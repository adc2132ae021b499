"""Task-KV: are the heads far from their layer's mean the ones that need the whole cache?"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from claims._cache import losses, questions
from claims.ledger import Claim, run
from heedful.core.call import CachedKV, Call
from heedful.core.method import Method
from heedful.methods.sparse.cache.task_kv import TaskKV

BUDGET, WINDOW, SINKS, RECENT, DRAWS = 0.4, 32, 4, 16, 2


class _Drawn(TaskKV):
    """As many whole heads, by chance."""

    seed: int = 0

    def apart(self, votes: Tensor, entries: CachedKV, call: Call) -> Tensor:
        draw = torch.Generator().manual_seed(977 * self.seed + call.layer)
        rank = torch.rand(votes.shape[:2], generator=draw).argsort(-1)
        return rank < self.far_heads(call) + self.nearest


def way(kind: type[TaskKV] = TaskKV, far: int = 1, near: int = 0, **more: int) -> TaskKV:
    """So many of a layer's three key heads are whole ones, the same in all layers."""
    return kind(BUDGET, WINDOW, sinks=SINKS, recent=RECENT, share=far / 3, deepest=far, nearest=near, **more)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    prompts = questions(seed, most=2)
    ways: dict[str, Method | None] = {
        "everything": None,
        "the farthest head is whole": way(),
        "the nearest head is whole": way(far=0, near=1),
        **{f"draw {i}": way(_Drawn, seed=DRAWS * seed + i) for i in range(DRAWS)},
    }
    found = {name: statistics.fmean(losses(text, each) for text in prompts) for name, each in ways.items()}
    chance = statistics.fmean(found.pop(f"draw {i}") for i in range(DRAWS))
    numbers = {f"loss, {name}": value for name, value in found.items()} | {"loss, a drawn head is whole": chance}
    return chance - numbers["loss, the farthest head is whole"], numbers


CLAIM = Claim(
    key="P310",
    method="TaskKV",
    says="Heads far from the semantic centre of their layer need the whole cache; the others do with sinks, recent "
    "tokens and those that draw most attention.",
    paper_number="LongBench at 40 % of the cache: 35.32 against 35.20 for heads chosen beforehand and 35.45 for all "
    "of it (Llama-2-7B-Chat)",
    setup=f"SmolLM2-135M, six towns' numbers strewn over some 350 tokens of prose, one of them asked for at the end; "
    f"{BUDGET:.0%} of the cache stays. One of a layer's three key heads keeps everything, the others {SINKS} sinks, "
    f"{RECENT} recent tokens and the best of the middle: the farthest head, against one drawn by chance, mean of "
    f"{DRAWS} draws. With three heads to choose from, the nearest one is not kept beside the farthest.",
    effect="nats of loss per digit that the farthest head saves over one by chance, at equal memory",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
