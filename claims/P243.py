"""TransformerAttribution: does a model's answer follow the tokens it names more than those that rollout names?"""

from __future__ import annotations

from functools import cache

from claims._texts import sentences
from claims.ledger import Claim, run
from heedful import models
from heedful.explaining.attribution import attribute
from heedful.explaining.faithful import faithfulness
from heedful.methods.explain.rollout import AttentionRollout
from heedful.methods.explain.transformer_attribution import TransformerAttribution

SENTENCES = 20  # a seed


@cache
def encoder() -> models.Loaded:
    return models.encoder()


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = encoder()
    totals = dict.fromkeys(
        ("attribution, removed", "attribution, put back", "rollout, removed", "rollout, put back"), 0.0
    )
    for sentence in sentences(seed, SENTENCES):
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        scores = {
            "attribution": attribute(model, ids, TransformerAttribution()),
            "rollout": attribute(model, ids, AttentionRollout()),
        }
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
    says="Attribution through attention beats rollout, raw attention and others on perturbation tests.",
    paper_number="none in the abstract",
    setup="MiniLM-L6 sentence embeddings, 20 sentences of Python's help texts a seed; tokens hidden from all others, "
    "or put back, from the highest score down in 10 steps; area under the cosine with the whole sentence's embedding. "
    "The paper removes image patches and watches a class.",
    effect="how much lower on removal, and higher on putting back, than rollout, mean of the two, in cosine",
    measure=measure,
    seeds=3,
    strong=0.02,
)


if __name__ == "__main__":
    run(CLAIM)
