"""PositionInfluence: does the first token's influence grow from layer to layer under a causal mask?"""

from __future__ import annotations

import torch

from claims._loaded import default
from claims._texts import passages
from claims.ledger import Claim, run
from heedful import attach
from heedful.methods.observe.position_influence import Influence, PositionInfluence

TEXTS, TOKENS = 2, 256  # a seed


def followed(model: torch.nn.Module, texts: list[torch.Tensor], residual: float) -> Influence:
    method = PositionInfluence(residual=residual)
    with attach(model, method) as attached, torch.no_grad():
        for ids in texts:
            attached(input_ids=ids)
        found: Influence = attached[method]
    return found


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = default()
    texts = [torch.tensor([tokenizer(text).input_ids[:TOKENS]]) for text in passages(seed, TEXTS, TOKENS)]
    fresh = type(model)(model.config).eval()  # the same model before training: the mask alone; the ledger sets the seed
    bare, mixed, untrained = (followed(m, texts, r) for m, r in ((model, 0.0), (model, 0.5), (fresh, 0.0)))
    numbers = {}
    for name, found in (("trained", bare), ("trained, residual 0.5", mixed), ("untrained", untrained)):
        numbers[f"first token's influence after one layer, {name}"] = found.first[min(found.first)]
        numbers[f"first token's influence after all layers, {name}"] = found.first[max(found.first)]
    whole = mixed.total[1:]
    numbers["first half of the text but the first token, residual 0.5"] = float(whole[:8].sum())
    numbers["second half of the text, residual 0.5"] = float(whole[8:].sum())
    grown = [x.first[max(x.first)] - x.first[min(x.first)] for x in (bare, untrained)]
    return min(grown), numbers


CLAIM = Claim(
    key="P331",
    method="PositionInfluence",
    says="The causal mask alone drives the influence of deep layers to the earliest tokens, against the decay with "
    "distance that the position encoding brings to each layer.",
    paper_number="none in the abstract",
    setup="SmolLM2-135M-Instruct and its own architecture at random weights, 2 of Python's help texts a seed cut to "
    "256 tokens, product of head means without residual as in the theorem. No decay is varied and no task is tried.",
    effect="first token's influence after all layers minus after one, the lesser of trained and untrained",
    measure=measure,
    strong=0.1,
)


if __name__ == "__main__":
    run(CLAIM)
