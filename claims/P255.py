"""Dynamic convolutions: as good as self-attention in a language model?"""

from __future__ import annotations

from claims._tiny_lm import Trained
from claims.ledger import Claim, run
from heedful.methods.mechanisms.local.dynamic_conv import DynamicConv
from heedful.methods.mechanisms.local.light_conv import LightConv

STEPS = 200
WIDE = (15, 31)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ways = {"softmax": None, "LightConv": LightConv(), "DynamicConv": DynamicConv(), "wide": DynamicConv(WIDE)}
    numbers = {f"loss, {name}": Trained(way, seed, STEPS).loss() for name, way in ways.items()}
    return numbers["loss, softmax"] - numbers["loss, DynamicConv"], numbers


CLAIM = Claim(
    key="P255",
    method="DynamicConv",
    says="Dynamic convolutions, whose weights each token predicts on its own, do as well as self-attention or better.",
    paper_number="29.7 BLEU on WMT'14 English-German",
    setup=f"A causal 2-layer byte model trained {STEPS} steps on Python's documentation with self-attention and with "
    "dynamic convolutions over the last 3 and 7 bytes, as in the paper's first two layers; held-out loss. Details: "
    f"light convolutions, and dynamic ones over {WIDE[0]} and {WIDE[1]} bytes.",
    effect="nats a byte that self-attention loses more",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
