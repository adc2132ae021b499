"""STAR: are two cuts of an image's tokens better than one, at as many tokens in the mean over layers?"""

from __future__ import annotations

from claims._sight import LANGUAGE, PATCHES, SHOWN, asked, log_probability, share_right, told
from claims.ledger import Claim, run
from heedful.methods import STAR

PICTURES, NOISE = 200, 0.5
FIRST, SECOND, MIDDLE = 48, 24, 2  # patches that are left, for the first two layers and for the others
ONCE = (MIDDLE * FIRST + (len(LANGUAGE) - MIDDLE) * SECOND) // len(LANGUAGE)  # as many in every layer
LAST = (len(LANGUAGE) * ONCE - MIDDLE * PATCHES) // (len(LANGUAGE) - MIDDLE)  # as many, where the first two see all


def cut(first: int, second: int) -> STAR:
    return STAR(SHOWN, first / PATCHES, late=MIDDLE - 1, late_share=second / first)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    item = asked(seed, PICTURES, NOISE)
    inputs, answers = item.inputs, item.answers
    ways = {
        "plain": None, "two cuts": cut(FIRST, SECOND), "by the image": cut(ONCE, ONCE),
        "by the text": cut(PATCHES, LAST),
    }  # fmt: skip
    found = {}
    for name, method in ways.items():
        logits = told(inputs, method)
        found[f"log-probability, {name}"] = log_probability(logits, answers)
        found[f"right, {name}"] = share_right(logits, answers)
    one = max(found["log-probability, by the image"], found["log-probability, by the text"])
    return found["log-probability, two cuts"] - one, found


CLAIM = Claim(
    key="P118",
    method="STAR",
    says="Cutting an image's tokens twice, by the image and later by the text, keeps more of the answers than one cut.",
    paper_number="none given in the abstract",
    setup=f"A vision-language model of LLaVA's class with 0.3M parameters, {PICTURES} noisy 16 x 16 pictures of two "
    f"things a seed, and a question about one of them. {FIRST} of {PATCHES} patches for the language model's first two "
    f"layers, {SECOND} for the two others; against {ONCE} in all layers chosen by the encoder, and all for the first "
    f"two and {LAST} for the others chosen by the text, whichever is better. All have as many in the mean. "
    "The layer of the second cut was changed once, after a look with other weights.",
    effect="log-probability of the right answer, above the better of the single cuts",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
