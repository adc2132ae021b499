"""ControlMLLM: does a latent that draws the attention to a marked part make a model answer from it?"""

from __future__ import annotations

from collections import defaultdict

import torch

from claims._loaded import default
from claims._marked import LINES, Marked, prompts
from claims.ledger import Claim, run
from heedful import attach, fit
from heedful.core.regions import Span
from heedful.methods.intervene.vision.control_mllm import ControlMLLM, _Energy

PROMPTS = 3
RATE = 2.0  # the best of 2, 6, 16 and 50 on five prompts of their own


def lines_of(item: Marked) -> Span:
    """Where the eight lines stand: all before the question but the first token, which every head uses as a sink."""
    stop = default().tokenizer(".\n").input_ids[-1]
    ends = (item.tokens[0] == stop).nonzero().flatten()
    return 1, int(ends[LINES - 1]) + 1


def neighbour(item: Marked) -> Span:
    """As many tokens before or after the marked ones."""
    (start, stop), *_ = item.spans
    by = stop - start if start == 0 else start - stop
    return max(0, start + by), stop + by


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model = default().model
    found: defaultdict[str, list[float]] = defaultdict(list)
    for item in prompts(seed, PROMPTS):
        image = lines_of(item)
        true = {"image": (image,), "marked": item.spans}
        ways = {"without": None, "marked": item.spans, "another place": (neighbour(item),)}
        for name, spans in ways.items():
            stack = _Energy()
            if spans is not None:
                prompt = {"input_ids": item.tokens, "roles": {"image": (image,), "marked": spans}}
                stack = fit(ControlMLLM(rate=RATE), model, [prompt]) | stack
            with torch.no_grad(), attach(model, stack, roles=true) as session:
                logits = session(input_ids=item.tokens, logits_to_keep=1).logits[0, -1].log_softmax(-1)
                found[f"energy, {name}"].append(float(session.loss()))
            found[f"log-probability, {name}"].append(float(logits[item.right]))
    means = {name: sum(values) / PROMPTS for name, values in found.items()}
    others = max(means["log-probability, without"], means["log-probability, another place"])
    return means["log-probability, marked"] - others, means


CLAIM = Claim(
    key="P155",
    method="ControlMLLM",
    says="A few steps of a latent on a prompt's tokens, down an energy that asks for attention on a marked part, make "
    "a model answer from that part.",
    paper_number="none given in the abstract",
    setup=f"SmolLM2-135M, a passage standing for the image: {PROMPTS} prompts in which two of {LINES} lines give a "
    "thing different codes and one of them is marked; a latent on all lines but the first token, up to 4 steps of size "
    f"{RATE:g} (chosen on other prompts; the authors' is 400). Details: the energy of the marked line.",
    effect="log-probability of the marked line's code, over the better of nothing and another place marked",
    measure=measure,
    strong=0.1,
)

if __name__ == "__main__":
    run(CLAIM)
