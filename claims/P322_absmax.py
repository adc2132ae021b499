"""Absmax: is a scale for each row better than one for the matrix?"""

from __future__ import annotations

from dataclasses import replace

from claims import P322
from claims._loaded import default
from claims.ledger import run
from heedful import operate
from heedful.methods import Absmax


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ids, model = P322.texts(seed), default().model
    numbers = {"loss": P322.loss(model, ids)}
    for bits in (8, 4):
        for share in ("row", "matrix"):
            numbers[f"loss, {bits} bits a {share}"] = P322.loss(operate(model, Absmax(bits, share)), ids)
    return numbers["loss, 8 bits a matrix"] - numbers["loss, 8 bits a row"], numbers


CLAIM = replace(
    P322.CLAIM,
    key="P322_absmax",
    method="Absmax",
    says="Vector-wise 8-bit weights, with a scale for each row, cost less than weights with one scale.",
    paper_number="none given for weights alone",
    setup=f"SmolLM2-135M-Instruct, {P322.TEXTS} texts of {P322.TOKENS} tokens of Python's documentation a seed; the "
    "weights of attention's projections in 8 bits, inputs as they are. Details: the same with 4 bits.",
    effect="nats a token that one scale a matrix loses more",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
