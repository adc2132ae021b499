"""In-Context Brush: is a subject that is shown taken over if more is taken from it, and from the prompt?"""

from __future__ import annotations

import torch

from claims._loaded import default
from claims._marked import Marked, prompts
from claims.ledger import Claim, run
from heedful import attach
from heedful.core.method import Stack
from heedful.methods import InContextBrush

PROMPTS = 8


def _roles(asked: Marked, elsewhere: bool) -> dict[str, tuple[tuple[int, int], ...]]:
    """The line that shows the subject, or one beside it; the words that ask, and the last of them, which is made."""
    ((start, stop),), length = asked.spans, asked.tokens.shape[1]
    by = stop - start if start == 0 else start - stop
    subject = (max(0, start + by), stop + by) if elsewhere else (start, stop)
    return {"subject": (subject,), "prompt": ((asked.asks, length - 1),), "target": ((length - 1, length),)}


@torch.no_grad()
def _taken_over(asked: list[Marked], what: InContextBrush | None, elsewhere: bool = False) -> tuple[float, float]:
    """The mean log-probability of what the subject's line says, and how often it beats the other line's."""
    chance, wins = 0.0, 0.0
    with attach(default().model, what or Stack()) as brushed:
        for item in asked:
            brushed.roles = _roles(item, elsewhere)
            logits = brushed(input_ids=item.tokens, logits_to_keep=1).logits[0, -1].log_softmax(-1)
            chance += float(logits[item.right]) / len(asked)
            wins += float(logits[item.right] > logits[item.wrong]) / len(asked)
    return chance, wins


def measure(seed: int) -> tuple[float, dict[str, float]]:
    asked = prompts(33500 + seed, PROMPTS)
    numbers: dict[str, float] = {}
    for name, what, elsewhere in (
        ("nothing", None, False),
        ("the brush", InContextBrush(), False),
        ("another line as the subject", InContextBrush(), True),
        ("the shift alone", InContextBrush(boost=0.0), False),
        ("the heads alone", InContextBrush(shift=0.0), False),
    ):
        chance, wins = _taken_over(asked, what, elsewhere)
        numbers |= {f"log-probability, {name}": chance, f"beats the other, {name}": wins}
    best = max(numbers["log-probability, nothing"], numbers["log-probability, another line as the subject"])
    return numbers["log-probability, the brush"] - best, numbers


CLAIM = Claim(
    key="P335",
    method="InContextBrush",
    says="What is made takes over the subject that is shown beside it if it is given more of what it takes from "
    "subject and prompt, and heads that look at the prompt count more.",
    paper_number="none in the abstract, which says that identity is kept better than by others",
    setup=f"SmolLM2-135M on text instead of FLUX on pictures side by side, for want of a model that has words and both "
    f"pictures in one sequence: {PROMPTS} prompts a seed in which two lines disagree. One is the subject, the question "
    "is the prompt, and its last token, behind which the answer is said, the target; the authors' settings, in all "
    "layers. Against no change, and another line as the subject. Beside it shift and heads alone. There were twelve "
    "prompts a seed in a first look at one seed, -0.63; eight cost less.",
    effect="nats of log-probability of what the subject's line says, above the better of both controls",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
