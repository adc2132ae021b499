"""Sentences that hold some of the k tokens with the most sum_l A^l_j, asked where the answer's first word is due."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.kinds.tokens import Prompt, Reader, Tokens
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, RoleName
from heedful.core.regions import Span
from heedful.core.sites import Site, reads
from heedful.core.stats import Sum
from heedful.methods.sparse.tokens._spans import without

_PAPER = Paper(
    "P248",
    "AttentionRAG: Attention-Guided Context Pruning in Retrieval-Augmented Generation",
    "Yixiong Fang, Tianran Sun, Yuling Shi, Xiaodong Gu",
    2025,
    "2503.10720",
    "arXiv",
    differs=(
        "The prompt has to end with the beginning of an answer; the authors let a language model write it.",
        "The query that predicts the answer's first word is asked, at the prompt's end; the paper's formula has that "
        "word's own attention.",
        "What the first word is, is not looked at: the authors drop a chunk for which it is 'none'.",
        "A chunk is whole sentences, as many as its tokens allow, and the spans of a role say where they stand.",
        "The paper's formulas were taken from another's code for it, which tells that the paper does not say how a "
        "layer's heads are put together; the authors' own was not found.",
    ),
)


class _LastQuery(Method):
    """What the last query of a prompt gives to each token, heads averaged, `[n]`."""

    total: int  # tokens of the prompt

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Sum | None:
        mine = (call.q_pos[0, 0] == self.total - 1).nonzero().flatten()
        return Sum.of(call.by_key(weights[0, :, mine].mean((0, 1)), self.total)) if len(mine) else None

    def answer(self, readings: Readings) -> Tensor:
        """Layers summed."""
        return torch.stack(readings.values_by_layer).sum(0)


class AttentionRAG(Tokens):
    """Drops the sentences of a prompt that hold none of the tokens at which its last token looks most."""

    paper = _PAPER
    role: RoleName = "documents"  # the role whose spans are sentences, which stay or go whole
    top: PositiveInt = 12  # tokens of a chunk that choose; the best value is the data's
    chunk: PositiveInt = 300  # tokens of the sentences that are read together

    @classmethod
    def neutral(cls) -> AttentionRAG:
        return cls(top=2**30)

    @classmethod
    def example(cls) -> AttentionRAG:
        return cls(top=1)

    def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
        spans = prompt.spans(self.role)
        kept = [span for chunk in self.chunks(spans) for span in self.looked_at(prompt, spans, chunk, read)]
        return without(prompt, [span for span in spans if span not in kept])

    def chunks(self, spans: tuple[Span, ...]) -> Iterator[list[Span]]:
        """The sentences in groups of no more than `chunk` tokens; one that is longer stands alone."""
        group: list[Span] = []
        for start, stop in spans:
            if group and sum(b - a for a, b in group) + stop - start > self.chunk:
                yield group
                group = []
            group.append((start, stop))
        if group:
            yield group

    def looked_at(self, prompt: Prompt, spans: tuple[Span, ...], chunk: list[Span], read: Reader) -> list[Span]:
        """Those sentences of a chunk in which the best tokens stand, the chunk being read alone with the question."""
        shown = without(prompt, [span for span in spans if span not in chunk])
        score: Tensor = read(shown, _LastQuery(len(shown)))
        places = [(number, i) for number, (a, b) in enumerate(shown.spans(self.role)) for i in range(a, b)]
        best = score[[i for _, i in places]].argsort(descending=True, stable=True)[: self.top].tolist()
        return [chunk[number] for number in sorted({places[i][0] for i in best})]


if __name__ == "__main__":
    from heedful import arrange, models

    model, tokenizer, _ = models.default()
    tokens: list[int] = []
    spans = []
    for fact in ("The lamp is green.", "The secret word is walnut.", "Trains run every hour.", "The dog sleeps."):
        piece = tokenizer(f"{fact}\n").input_ids
        spans.append((len(tokens), len(tokens) + len(piece)))
        tokens += piece
    tokens += tokenizer("Question: what is the secret word?\nAnswer: the secret word is").input_ids
    prompt = Prompt(tuple(tokens), {"documents": tuple(spans)})
    print(tokenizer.decode(arrange(model, prompt, AttentionRAG(top=2)).tokens))
