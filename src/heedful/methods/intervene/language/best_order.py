"""The order of documents, of some drawn, with the highest max_d mean over layers, heads of sum_(j in d) A_(last, j)."""

from __future__ import annotations

import random

from heedful.core.kinds.tokens import Prompt, Reader, Tokens
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, RoleName
from heedful.methods.intervene.language._documents import _DocumentAttention


class BestOrder(Tokens):
    """Tries random orders of the documents and takes the one in which a single document gets the most attention.

    Each order is read once. The order that is given is among those tried, and wins where others equal it.
    """

    paper = Paper(
        "P011",
        "Masking in Multi-hop QA: An Analysis of How Language Models Perform with Context Permutation",
        "Wenyu Huang, Pavlos Vougiouklis, Mirella Lapata, Jeff Z. Pan",
        2025,
        "2505.11754",
        "ACL 2025",
        differs=(
            "The prompt's last token is asked, which the answer's first word is read from; the authors' code has the "
            "model answer under each order, and averages over the answer's tokens.",
            "Layers are averaged where the authors add them up, which finds the same order.",
            "The order that the prompt comes in is one of those tried; the authors draw all of them.",
            "The paper's mask by which documents see each other both ways, and the fine-tuning for it, are not here.",
        ),
    )
    role: RoleName = "documents"  # the role that names the documents' spans
    orders: PositiveInt = 20  # orders that are tried, the given one among them; the authors' code: 20
    seed: int = 0  # of the orders that are drawn

    @classmethod
    def neutral(cls) -> BestOrder:
        return cls(orders=1)

    def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
        places = range(len(prompt.spans(self.role)))
        draw = random.Random(self.seed)
        drawn = [tuple(draw.sample(places, len(places))) for _ in range(self.orders - 1)]
        shown = [prompt, *(prompt.reordered(self.role, order) for order in drawn)]
        return max(shown, key=lambda each: float(read(each, _DocumentAttention(self.role, len(each) - 1)).max()))


if __name__ == "__main__":
    from heedful import arrange, models

    model, tokenizer, _ = models.default()
    facts = ["Anna's teacher is Boris.", "Trains run every hour.", "Boris was born in Oslo.", "The dog sleeps."]
    tokens: list[int] = []
    spans = []
    for fact in facts:
        piece = tokenizer(f"DOCUMENT: {fact}\n\n").input_ids
        spans.append((len(tokens), len(tokens) + len(piece)))
        tokens += piece
    tokens += tokenizer("Question: where was Anna's teacher born?\nAnswer: Anna's teacher was born in").input_ids
    best = arrange(model, Prompt(tuple(tokens), {"documents": tuple(spans)}), BestOrder(orders=8))
    print(tokenizer.decode(best.tokens))
