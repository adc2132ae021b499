"""ActQKV: does a probe of the queries that are unlike the others find better blocks than the mean of all of them?"""

from __future__ import annotations

from torch import Tensor

from claims._cache import losses, recall
from claims._texts import apart
from claims.ledger import Claim, run
from heedful.methods.sparse.decode.act_qkv import ActQKV
from heedful.methods.sparse.prefill.sink_window import SinkWindow

SEEN, SINKS, CHUNK, BLOCK = 84, 4, 16, 8


class _Even(ActQKV):
    """The control: all queries of a chunk weigh the same."""

    paper = ActQKV.paper

    @staticmethod
    def _weights(query: Tensor, member: Tensor) -> Tensor:
        return member / member.sum(-1, keepdim=True).clamp(min=1)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    text = recall(seed, source=apart)
    ways = {
        "everything": None,
        "probe": ActQKV(SEEN, SINKS, CHUNK, CHUNK, BLOCK),
        "mean of queries": _Even(SEEN, SINKS, CHUNK, CHUNK, BLOCK),
        "sinks and window": SinkWindow(SINKS, SEEN - SINKS),
    }
    numbers = {f"loss on numbers, {how}": losses(text, method) for how, method in ways.items()}
    return numbers["loss on numbers, mean of queries"] - numbers["loss on numbers, probe"], numbers


CLAIM = Claim(
    key="P295",
    method="ActQKV",
    says="A probe in which queries weigh more the less they are like others finds what a chunk needs better than "
    "their mean.",
    paper_number="none in the abstract; LongBench and InfiniteBench at a budget of about 2,000 tokens",
    setup="SmolLM2-135M, towns' numbers strewn over about 400 tokens and asked for after them; every chunk of "
    f"{CHUNK} queries sees {SEEN} tokens: {SINKS} sinks, a window of {CHUNK}, and blocks of {BLOCK} that the probe "
    "chooses, against the same with every query weighing alike. Beside it sinks and a window of as many tokens.",
    effect="nats of loss per digit that the probe saves at as many tokens",
    measure=measure,
    seeds=6,
)

if __name__ == "__main__":
    run(CLAIM)
