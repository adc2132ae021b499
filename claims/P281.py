"""ParallelToFirst: do tokens that run parallel to the first one draw more attention than others?"""

from __future__ import annotations

import torch

from claims._loaded import default
from claims._texts import passages
from claims.ledger import Claim, run
from heedful import attach
from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.methods.observe.parallel_to_first import ParallelToFirst

TEXTS, TOKENS = 4, 256  # a seed
LAST = TOKENS // 2  # later keys average too few rows


class Stream(Method):
    """Keeps the residual stream, for this experiment only."""

    paper = ParallelToFirst.paper

    @reads(Site.RESIDUAL)
    def keep(self, stream: torch.Tensor, call: Call) -> Cat:
        return Cat.of(f"{call.forward}", stream[0])


def measure(seed: int) -> tuple[float, dict[str, float]]:
    from heedful.methods.observe.sink_rate import SinkRate

    model, tokenizer, _ = default()
    near: list[float] = []
    other: list[float] = []
    shares: dict[int, list[float]] = {}
    for text in passages(seed, TEXTS, TOKENS):
        ids = torch.tensor([tokenizer(text).input_ids[:TOKENS]])
        with attach(model, SinkRate() | ParallelToFirst() | Stream()) as attached, torch.no_grad():
            attached(input_ids=ids)
        weight = attached[SinkRate()].importance
        parallels = attached[ParallelToFirst()]
        for layer in parallels.near_layers:
            shares.setdefault(layer, []).append(parallels.near_share(layer))
            if layer + 1 not in weight:
                continue
            x = attached[Stream()][layer].value[0]
            close = torch.cosine_similarity(x, x[:1], dim=-1)[1:LAST] >= parallels.near
            got = weight[layer + 1].mean(0)[1:LAST]
            near += got[close].tolist()
            other += got[~close].tolist()
    if not near:
        return 0.0, {"tokens parallel to the first": 0.0}
    effect = sum(near) / len(near) - sum(other) / len(other)
    numbers = {
        "tokens parallel to the first, over texts and layers": float(len(near)),
        "weight that each of them gets": sum(near) / len(near),
        "weight that the others get": sum(other) / len(other),
        "first layer with some": float(min(shares)),
        "last layer with some": float(max(shares)),
    }
    return effect, numbers


CLAIM = Claim(
    key="P281",
    method="ParallelToFirst",
    says="Sinks in the middle of the text are tokens nearly parallel to the first one, which amplifies the attention "
    "that they get; a loss on the cosine removes them.",
    paper_number="none in the abstract",
    setup="SmolLM2-135M-Instruct, 4 of Python's help texts a seed cut to 256 tokens; mean weight over heads and rows "
    "in the layer after, tokens 2 to 128. Text alone, no speech; the loss is not tried.",
    effect="weight on tokens parallel to the first, minus that on others",
    measure=measure,
    strong=0.01,
)


if __name__ == "__main__":
    run(CLAIM)
