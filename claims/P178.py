"""AttentionViz: does distance in the joint space tell what a query looks at better than distance before?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._loaded import default
from claims._texts import passages
from claims.ledger import Claim, run
from heedful import attach
from heedful.methods.explain.attention_viz import AttentionViz, JointEmbedding

FITTED, READ, TOKENS = 4, 2, 64  # texts that shift and scale are taken from, and others that they are tried on


def seen(texts: list[str]) -> JointEmbedding:
    model, tokenizer, _ = default()
    method = AttentionViz(TOKENS)
    with attach(model, method) as attached, torch.no_grad():
        for text in texts:
            attached(input_ids=torch.tensor([tokenizer(text).input_ids[:TOKENS]]))
        found: JointEmbedding = attached[method]
    return found


def ranks(x: Tensor) -> Tensor:
    return x.argsort(-1).argsort(-1).double()


def agreement(query: Tensor, key: Tensor, moved: Tensor, there: Tensor) -> float:
    """Mean rank correlation, over heads and rows, of a key's weight in its row with its nearness in the moved space."""
    found = []
    for i in range(TOKENS // 2, TOKENS):  # a row's weights stand in the order of its products
        weight = ranks((query[:, i, None] * key[:, : i + 1]).sum(-1))
        near = ranks(-(moved[:, i, None] - there[:, : i + 1]).norm(dim=-1))
        found.append(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(weight, near, strict=True)]))
    return float(torch.stack(found).mean())


def measure(seed: int) -> tuple[float, dict[str, float]]:
    texts = passages(seed, FITTED + READ, TOKENS)
    fitted, others = seen(texts[:FITTED]), seen(texts[FITTED:])
    found: dict[str, list[float]] = {"as they were": [], "shifted": [], "scaled": [], "joint": []}
    for layer, pieces in others.texts.items():
        shift, scale = fitted.shift[layer], fitted.scale[layer]
        for query, key in pieces:
            for name, moved in (
                ("as they were", (query, key)),
                ("shifted", (query, key + shift)),
                ("scaled", (query * scale, key / scale)),
                ("joint", fitted.embed(layer, query, key)),
            ):
                found[name].append(agreement(query, key, *moved))
    numbers = {f"rank correlation, {name}": sum(x) / len(x) for name, x in found.items()}
    numbers |= {
        "correlation with the product, as they were": float(fitted.raw.mean()),
        "correlation with the product, joint": float(fitted.joint.mean()),
    }
    return numbers["rank correlation, joint"] - numbers["rank correlation, as they were"], numbers


CLAIM = Claim(
    key="P178",
    method="AttentionViz",
    says="With keys shifted to the queries' centre and both scaled, which changes no weight, near queries and keys are "
    "those that attend to each other.",
    paper_number="none in the abstract",
    setup=f"SmolLM2-135M-Instruct, {FITTED} of Python's help texts a seed, {TOKENS} tokens each, give every head's "
    f"shift and scale; on {READ} others, rows {TOKENS // 2} to {TOKENS - 1} of all heads: the rank correlation of a "
    "key's weight with its nearness to the query. Shift and scale alone are in the details.",
    effect="rank correlation of weight and nearness that the joint space gains",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
