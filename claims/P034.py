"""ModalityShare: does text rule over a long redundant span, and less so when the span is shortened?"""

from __future__ import annotations

import math

import torch

from claims._loaded import default
from claims._texts import sentences
from claims.ledger import Claim, run
from heedful import attach
from heedful.methods.observe.modality_share import ModalityShare, Shares

COPIES, WRITTEN = 12, 16  # times that the redundant passage stands there; tokens that the model writes
BEFORE, AFTER = "Read the following notes.\n\n", "\n\nWhat are these notes about? Answer in one sentence.\n"


def shares(passage: str, copies: int) -> Shares:
    """What the model looks at while it writes its answer."""
    model, tokenizer, _ = default()
    before, middle, after = (tokenizer(x).input_ids for x in (BEFORE, passage, AFTER))
    ids = torch.tensor([before + middle * copies + after])
    start, stop = len(before), len(before) + len(middle) * copies
    roles = {"context": ((start, stop),), "text": ((0, start), (stop, ids.shape[1]))}
    method = ModalityShare().when("decode")
    with attach(model, method, roles=roles) as attached:
        attached.generate(input_ids=ids, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False)
        return attached[method]


def measure(seed: int) -> tuple[float, dict[str, float]]:
    passage = " " + " ".join(sentences(seed, 3))
    long, short = shares(passage, COPIES), shares(passage, 1)
    numbers = {
        "MDI, passage twelve times": long.overall("context")[2],
        "MDI, passage once": short.overall("context")[2],
        "MDI, passage twelve times, lowest layer": float(long.mdi("context")[0]),
        "MDI, passage twelve times, highest layer": float(long.mdi("context")[-1]),
        "share of attention on the passages": long.overall("context")[0],
        "share of attention on the passage once": short.overall("context")[0],
    }
    # how far from 1, which is balance, either way
    apart = [abs(math.log(numbers[name])) for name in ("MDI, passage twelve times", "MDI, passage once")]
    return apart[0] - apart[1], numbers


CLAIM = Claim(
    key="P034",
    method="ModalityShare",
    says="Models look far more at a text token than at a token of another modality, because the latter are many and "
    "redundant; compressing them brings the dominance index near 1.",
    paper_number="token compression brings LLaVA-7B's MDI from 10.23 to 0.86",
    setup="SmolLM2-135M-Instruct, which has no second modality: three sentences twelve times over stand for it, "
    "between an instruction and a question; dropping all copies but one is the compression. Attention of 16 written "
    "tokens; the first token, on which many heads park, is text. Only the way towards 1 is judged, not whether it is "
    "reached.",
    effect="distance of ln MDI from 0, redundant span minus shortened one",
    measure=measure,
    strong=1.0,
)


if __name__ == "__main__":
    run(CLAIM)
