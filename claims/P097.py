"""Attention knockout: in which layers does what an image shows reach the question?"""

from __future__ import annotations

from claims._sight import LANGUAGE, asked, log_probability, share_right, told
from claims.ledger import Claim, run
from heedful.methods import AttentionKnockout

PICTURES, NOISE = 150, 0.3


def measure(seed: int) -> tuple[float, dict[str, float]]:
    item = asked(seed, PICTURES, NOISE)
    inputs, answers = item.inputs, item.answers
    plain, lost = log_probability(told(inputs), answers), []
    found = {}
    for number, layer in enumerate(LANGUAGE, 1):
        logits = told(inputs, AttentionKnockout().on(layers=layer))
        lost.append(plain - log_probability(logits, answers))
        found |= {f"lost, layer {number}": lost[-1], f"right, layer {number}": share_right(logits, answers)}
    found["lost, all layers"] = plain - log_probability(told(inputs, AttentionKnockout().on(layers=LANGUAGE)), answers)
    return sum(lost[1:-1]) / 2 - max(lost[0], lost[-1]), found


CLAIM = Claim(
    key="P097",
    method="AttentionKnockout",
    says="What an image shows reaches the text in middle layers; early and late ones contribute only marginally.",
    paper_number="about 25 % of all layers",
    setup=f"A vision-language model of LLaVA's class with 0.3M parameters, {PICTURES} noisy 16 x 16 pictures of two "
    "things a seed, and a question about one of them. The image is hidden from the question in one of the language "
    "model's four layers at a time. What the right answer loses in log-probability: the mean of the two middle layers "
    "against the first or the last, whichever loses more.",
    effect="log-probability lost without the image in a middle layer, above the first or last one",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
