"""RSQ: do weights lose less when tokens count by the attention they get?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims import P322
from claims._loaded import default
from claims._texts import apart
from claims.ledger import Claim, run
from heedful import fit, operate
from heedful.methods import RSQ, Absmax
from heedful.methods.compress.quantise._calibrated import Calibrated

SHOWN, TOKENS, UNSEEN = 4, 160, 4
LAYERS = (8, 20)


def shown(seed: int, count: int = SHOWN) -> list[dict[str, Tensor]]:
    """Texts to fit on, one batch."""
    ids = [default().tokenizer(x).input_ids[:TOKENS] for x in apart(seed, count, TOKENS, fitting=True)]
    return [{"input_ids": torch.tensor(ids)}]


def lost(how: Calibrated | Absmax, seed: int) -> float:
    """Loss on texts unseen, once rounded."""
    model = default().model
    return P322.loss(operate(model, fit(how, model, shown(seed))), unseen(seed))


def unseen(seed: int) -> list[Tensor]:
    return P322.texts(seed)[:UNSEEN]


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = {
        "loss": P322.loss(default().model, unseen(seed)),
        "loss, nearest": lost(Absmax(3, layers=LAYERS), seed),
        "loss, all tokens alike": lost(RSQ(least=1.0, layers=LAYERS), seed),
        "loss, by attention": lost(RSQ(layers=LAYERS), seed),
    }
    return numbers["loss, all tokens alike"] - numbers["loss, by attention"], numbers


CLAIM = Claim(
    key="P027",
    method="RSQ",
    says="Rounding that learns from the tokens that get much attention is better than one that learns from all alike.",
    paper_number="none in the abstract; better than its baselines on LLaMA3, Mistral and Qwen2.5",
    setup=f"SmolLM2-135M-Instruct, attention's projections of {len(LAYERS)} of 30 layers in 3 bits, fitted to {SHOWN} "
    f"texts of {TOKENS} tokens of Python's documentation a seed; loss on {UNSEEN} others of {P322.TOKENS}, against "
    "the same with the same weight for all tokens, which is GPTQ in the turned basis. Detail: the nearest values.",
    effect="nats a token that equal weights lose more",
    measure=measure,
    seeds=5,
)

if __name__ == "__main__":
    run(CLAIM)
