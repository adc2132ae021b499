"""TransformerAttribution: does a model's answer follow the tokens it names more than those that rollout names?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._loaded import encoder
from claims._texts import sentences
from claims.ledger import Claim, run
from heedful.core.entry import Readings
from heedful.core.stats import Cat
from heedful.explaining.attribution import attribute
from heedful.explaining.faithful import faithfulness
from heedful.methods.explain.rollout import AttentionRollout
from heedful.methods.explain.transformer_attribution import TransformerAttribution

SENTENCES = 20  # a seed


class _Normalised(TransformerAttribution):
    """Each row of a layer's map plus I divided by its sum, as the paper's BERT code does before it multiplies them."""

    paper = TransformerAttribution.paper

    def answer(self, readings: Readings) -> list[Tensor]:
        (patterns,) = zip(*(stat.value for stat in readings.values() if isinstance(stat, Cat)), strict=True)
        out = torch.eye(patterns[0].shape[-1])
        for pattern in patterns:
            layer = (pattern.grad * pattern.detach()).clamp(min=0).mean(1) + torch.eye(pattern.shape[-1])
            out = layer / layer.sum(-1, keepdim=True) @ out
        return [out]


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = encoder()
    ways = {"attribution": _Normalised(), "not normalised": TransformerAttribution(), "rollout": AttentionRollout()}
    totals = {f"{name}, {what}": 0.0 for name in ways for what in ("removed", "put back")}
    for sentence in sentences(seed, SENTENCES):
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        scores = {name: attribute(model, ids, method) for name, method in ways.items()}
        found = faithfulness(model, ids, scores, seeds=1)
        for name in scores:
            totals[f"{name}, removed"] += float(found.area(found.deletion[name])) / SENTENCES
            totals[f"{name}, put back"] += float(found.area(found.insertion[name])) / SENTENCES
    falls = totals["rollout, removed"] - totals["attribution, removed"]
    rises = totals["attribution, put back"] - totals["rollout, put back"]
    return (falls + rises) / 2, totals


CLAIM = Claim(
    key="P243",
    method="TransformerAttribution",
    says="Attribution through attention beats rollout, raw attention and others on perturbation tests; said of "
    "gradients times relevance, measured of gradients times weights, which is the follow-up's rule (2103.15679).",
    paper_number="none in the abstract",
    setup=f"MiniLM-L6 sentence embeddings, {SENTENCES} sentences of Python's help texts a seed, none of which another "
    "has; rows normalised as in the paper's BERT code; tokens hidden from all others, or put back, from the highest "
    "score down in 10 steps; area under the cosine with the whole sentence's embedding. Beside it rows as they come, "
    "as the follow-up has them. The paper removes image patches and watches a class. (Measured before over 3 seeds "
    "with rows as they come: +0.16, holds.)",
    effect="how much lower on removal, and higher on putting back, than rollout, mean of the two, in cosine",
    measure=measure,
    strong=0.02,
)


if __name__ == "__main__":
    run(CLAIM)
