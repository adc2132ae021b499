"""FoPru: do the most significant patches tell more of an image than as many others?"""

from __future__ import annotations

from claims._fewer_patches import DRAWS, LAYER, SHOWN, cosines
from claims.ledger import Claim, run
from heedful.methods import FoPru

SHARE = 0.25


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = cosines(seed, {"tokens": FoPru(), "rows": FoPru(by="row")}, SHARE)
    return numbers["tokens"] - numbers["drawn"], numbers


CLAIM = Claim(
    key="P198",
    method="FoPru",
    says="The patches that a late layer of the encoder finds significant are enough for who reads on.",
    paper_number="none given in the abstract: accuracy is kept with few visual tokens",
    setup=f"DINOv2-S/14, {SHOWN} crops of a photograph with a disc of another one in each; patches chosen in layer "
    f"{LAYER}, and the last layer, which sees {SHARE:.0%} of them, stands for a language model. How near its class "
    f"token is to that of the whole image, against as many patches drawn at random, {DRAWS} times. "
    "Details: whole rows.",
    effect="cosine with the class token of the whole image, above that with patches drawn at random",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
