"""TKL: is a long document found more surely when read whole in chunks than by its beginning?"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from claims._texts import apart
from claims.ledger import Claim, run
from heedful import attach, models
from heedful.core.method import Stack
from heedful.methods import TKL

DOCUMENTS, WORDS, ASKED, QUESTIONS = 14, 320, 12, 6
SIZE, OVERLAP, BEGINNING = 40, 5, 200  # tokens; the paper compares with a model of documents' first 200


@torch.no_grad()
def embedded(texts: list[str], what: TKL | None = None, tokens: int = 512) -> Tensor:
    """What MiniLM makes of texts, the mean over tokens, of length 1."""
    model, tokenizer, _ = models.encoder()
    out = []
    with attach(model, Stack() if what is None else what) as under:
        for text in texts:
            given = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens)
            out.append(under(**given).last_hidden_state[0].mean(0))
    return torch.nn.functional.normalize(torch.stack(out), dim=-1)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw, questions, documents = random.Random(seed), [], []
    for piece in apart(seed, DOCUMENTS, WORDS):
        words = piece.split()
        starts = sorted(draw.sample(range(0, WORDS - ASKED, ASKED), QUESTIONS))
        questions += [" ".join(words[i : i + ASKED]) for i in starts]
        kept = [word for i, word in enumerate(words) if not any(start <= i < start + ASKED for start in starts)]
        documents.append(" ".join(kept))
    asked = embedded(questions)
    wanted = torch.arange(DOCUMENTS).repeat_interleave(QUESTIONS)
    found = {}
    for name, what, tokens in (
        ("chunks", TKL(SIZE, OVERLAP), 512), ("whole", None, 512), ("beginning", None, BEGINNING)
    ):  # fmt: skip
        scores = asked @ embedded(documents, what, tokens).T
        better = (scores > scores.gather(1, wanted[:, None])).sum(1)
        found[name] = float((1 / (1 + better)).mean())
    return found["chunks"] - found["beginning"], found


CLAIM = Claim(
    key="P074",
    method="TKL",
    says="A long document read whole, in chunks that see little around them, is found more surely than by its "
    "beginning.",
    paper_number="significant gains on TREC 2019 documents (abstract, without numbers)",
    setup=f"MiniLM-L6 as it is, {DOCUMENTS} passages of {WORDS} words of Python's help a seed, {QUESTIONS} spans of "
    f"{ASKED} words cut out of each as questions; the mean reciprocal rank of the passage that a question is of, by "
    f"cosine: read in chunks of {SIZE} tokens that see {OVERLAP} around them, read by all to all, and its first "
    f"{BEGINNING} tokens alone. Nothing is trained, and none of the paper's matching of terms is used.",
    effect="mean reciprocal rank in chunks, less by the beginning",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
