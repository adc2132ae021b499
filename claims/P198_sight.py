"""FoPru before a language model: do the most significant patches answer more than as many drawn?"""

from __future__ import annotations

from claims._fewer_seen import SETUP, answers
from claims.ledger import Claim, run
from heedful.methods import FoPru


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = answers(seed, {"tokens": FoPru()})
    return found["log-probability, tokens"] - found["log-probability, drawn"], found


CLAIM = Claim(
    key="P198_sight",
    method="FoPru",
    says="A language model answers better from the patches that the encoder finds significant than from others.",
    paper_number="none given in the abstract: accuracy is kept with few visual tokens",
    setup=f"{SETUP} Against as many drawn at random.",
    effect="log-probability of the right answer, above that with patches drawn at random",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
