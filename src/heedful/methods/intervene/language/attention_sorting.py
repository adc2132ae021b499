"""score_d = mean over layers and heads of sum_(j in d) A_(last, j); documents sorted by it, the most attended last."""

from __future__ import annotations

from heedful.core.kinds.tokens import Prompt, Reader, Tokens
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, RoleName
from heedful.methods.intervene.language._documents import _DocumentAttention


class AttentionSorting(Tokens):
    """Puts the documents of a prompt into the order of the attention they get, round after round, the best one last.

    A longer document counts for more, since scores are sums; the spans must hold a document's heading and its end too.
    """

    paper = Paper(
        "P125",
        "Attention Sorting Combats Recency Bias In Long Context Language Models",
        "Alexander Peysakhovich, Adam Lerer",
        2023,
        "2310.01427",
        differs=(
            "All documents are kept; the authors' code can also keep the best few.",
            "Documents that are attended equally keep their order; the authors' code turns it round.",
        ),
    )
    role: RoleName = "documents"  # the role that names the documents' spans
    rounds: NonNegativeInt = 3  # sorts; the authors' code: 3, their experiments up to 5

    @classmethod
    def neutral(cls) -> AttentionSorting:
        return cls(rounds=0)

    def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
        prompt.spans(self.role)
        for _ in range(self.rounds):
            scores = read(prompt, _DocumentAttention(self.role, len(prompt) - 1))
            order = tuple(scores.argsort(stable=True).tolist())
            if order == tuple(range(len(order))):
                break  # the same prompt would be scored the same again
            prompt = prompt.reordered(self.role, order)
        return prompt


if __name__ == "__main__":
    from heedful import arrange, models

    model, tokenizer, _ = models.default()
    facts = ["The lamp is green.", "The secret word is walnut.", "Trains run every hour.", "The dog sleeps."]
    tokens: list[int] = []
    spans = []
    for fact in facts:
        piece = tokenizer(f"DOCUMENT: {fact}\n\n").input_ids
        spans.append((len(tokens), len(tokens) + len(piece)))
        tokens += piece
    tokens += tokenizer("Question: what is the secret word?\nAnswer: the secret word is").input_ids
    sorted_prompt = arrange(model, Prompt(tuple(tokens), {"documents": tuple(spans)}), AttentionSorting())
    print(tokenizer.decode(sorted_prompt.tokens))
