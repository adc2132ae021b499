"""Light convolutions: does it matter that dynamic ones look at the token before they choose their weights?"""

from __future__ import annotations

from dataclasses import replace

from claims import P255
from claims._tiny_lm import Trained
from claims.ledger import run
from heedful.methods.mechanisms.local.dynamic_conv import DynamicConv
from heedful.methods.mechanisms.local.light_conv import LightConv


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ways = {"LightConv": LightConv(), "DynamicConv": DynamicConv()}
    numbers = {f"loss, {name}": Trained(way, seed, P255.STEPS).loss() for name, way in ways.items()}
    return numbers["loss, LightConv"] - numbers["loss, DynamicConv"], numbers


CLAIM = replace(
    P255.CLAIM,
    key="P255_light",
    method="LightConv",
    says="Convolutions whose weights each token predicts do better than light ones, which are the same at every token.",
    paper_number="28.9 (light) and 29.7 (dynamic) BLEU on WMT'14 English-German",
    setup=f"A causal 2-layer byte model trained {P255.STEPS} steps on Python's documentation with light and with "
    "dynamic convolutions over the last 3 and 7 bytes; held-out loss.",
    effect="nats a byte that light convolutions lose more",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
