"""Yaad: does a memory that learns by Huber's loss keep what it holds when a value is out of the ordinary?"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from claims.ledger import Claim, run
from heedful.core.call import Call
from heedful.core.positions import Positions
from heedful.methods import Yaad

WIDTH, PAIRS, ODD, TIMES, BATCH = 32, 24, 2, 20.0, 64
BOUND = 1.5  # lengths of an ordinary value
NEVER = 1e4


def recalled(keys: Tensor, values: Tensor, bound: float) -> Tensor:
    """What a memory gives for each key `[b n d]` once all pairs were shown, one after another."""
    n = keys.shape[1]
    raw = bound if bound > 20 else math.log(math.expm1(bound))  # what softplus makes the bound
    zeros = torch.zeros(1, WIDTH, 3)
    params = {"by_key": zeros, "by_value": zeros, "start": torch.tensor([[4.0, 0.0, raw]])}
    call = Call(0, 1, "memory", 1, 1, Positions.row(0, n), Positions.row(0, n), 1.0, params=params, batch=len(keys))
    given = (keys[:, None], keys[:, None], values[:, None])
    return Yaad().attend(given, call)[:, 0]


def measure(seed: int) -> tuple[float, dict[str, float]]:
    random = torch.Generator().manual_seed(seed)
    keys, values = (normalize(torch.randn(BATCH, PAIRS, WIDTH, generator=random), dim=-1) for _ in range(2))
    odd = torch.rand(BATCH, PAIRS, generator=random).argsort(1) < ODD
    found = {}
    for what, shown in (("plain", values), ("odd ones", torch.where(odd[..., None], TIMES * values, values))):
        for way, bound in (("squares", NEVER), ("Huber", BOUND)):
            error = (recalled(keys, shown, bound) - values).norm(dim=-1)
            found[f"{what}, {way}"] = float(error[~odd].mean())
    return found["odd ones, squares"] - found["odd ones, Huber"], found


CLAIM = Claim(
    key="P058",
    method="Yaad",
    says="Learning by Huber's loss protects a memory from events out of the ordinary.",
    paper_number="none given",
    setup=f"{PAIRS} pairs of keys and values of length 1 in {WIDTH} dimensions, shown once to a memory with the gates "
    f"that Yaad begins with, {ODD} of the values {TIMES:g} times as long; how far what is recalled for the other keys "
    f"is from their values, with a bound of {BOUND} and with one that no error reaches, {BATCH} memories a seed. "
    "Details: the same without long values. Nothing is trained.",
    effect="lengths of a value that squares err more, of pairs beside the long ones",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
