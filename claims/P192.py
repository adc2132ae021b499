"""Adversarial training of attention: do weights tell better which words matter, than after plain training or noise?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from claims.ledger import Claim, run
from heedful import Method
from heedful.methods import AttentionAT
from heedful.nn import Attention

WORDS, LENGTH, TELLING = 60, 20, 6  # words of the language and of a text; so many of them tell of each class
TEXTS, TRIED, BATCH, EPOCHS, RATE, WIDTH = 200, 500, 20, 15, 3e-3, 32
SIZE, NOISE = 1.0, 1.0  # norm of what is added to a text's scores; deviation of the noise that they are tried under


class _Drawn(AttentionAT):
    """The control: a nudge of the same size in a drawn direction."""

    def direction(self, gradient: Tensor) -> Tensor:
        return nn.functional.normalize(torch.randn_like(gradient), dim=-1)


class _Turned(AttentionAT):
    """Along the negative gradient, as the authors' code has it for its interpretable form."""

    def direction(self, gradient: Tensor) -> Tensor:
        return -super().direction(gradient)


WAYS: dict[str, Method | None] = {
    "plain": None,
    "drawn": _Drawn(SIZE),
    "adversarial": AttentionAT(SIZE),
    "turned around": _Turned(SIZE),
}


def drawn(random: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Texts `[b n]` in which more words tell of one class than of the other, and which it is `[b]`."""
    label = torch.randint(2, (rows,), generator=random)
    text = torch.randint(2 * TELLING, WORDS, (rows, LENGTH), generator=random)
    for row, of in zip(text, label.tolist(), strict=True):
        more = int(torch.randint(2, 4, (), generator=random))
        less = int(torch.randint(more, (), generator=random))
        places = torch.randperm(LENGTH, generator=random)
        for which, here in ((of, places[:more]), (1 - of, places[more : more + less])):
            row[here] = which * TELLING + torch.randint(TELLING, (len(here),), generator=random)
    return text, label


class _Reader(nn.Module):
    """A recurrent net over the words, pooled by one learned query."""

    def __init__(self, method: Method | None) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.reader = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.attention, self.out = Attention(WIDTH, 1, method, batch_first=True), nn.Linear(WIDTH, 1)

    def forward(self, text: Tensor, words: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A logit for each text, and its weights `[b n]`."""
        read, _ = self.reader(self.words(text) if words is None else words)
        pooled, weights = self.attention(self.query.expand(len(read), -1, -1), read, read, need_weights=True)
        return self.out(pooled)[:, 0, 0], weights[:, 0]


def trained(method: Method | None, seed: int) -> _Reader:
    torch.manual_seed(seed)
    model, random = _Reader(method), torch.Generator().manual_seed(seed)
    texts, labels = drawn(random, TEXTS)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(TEXTS, generator=random).split(BATCH):
            optimiser.zero_grad()
            for _ in range(2):
                logits, _ = model(texts[chosen])
                nn.functional.binary_cross_entropy_with_logits(logits, labels[chosen].float()).backward()
            optimiser.step()
    return model.eval()


def judged(model: _Reader, seed: int) -> dict[str, float]:
    texts, labels = drawn(torch.Generator().manual_seed(10_000 + seed), TRIED)
    words = model.words(texts).detach().requires_grad_()
    logits, weights = model(texts, words)
    (slope,) = torch.autograd.grad(logits.sum(), words)
    pairs = zip(weights.detach(), slope.norm(dim=-1), strict=True)
    alike = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
    noise = NOISE * torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        read, _ = model.reader(words)
        values = model.attention.v_proj(read)
        pooled = ((weights.log() + noise).softmax(-1)[:, None] @ values)[:, 0]
        noisy = model.out(model.attention.out_proj(pooled))[:, 0]
    return {
        "weights and gradients": float(alike.mean()),
        "right": float(((logits > 0) == (labels > 0)).float().mean()),
        "right under noise": float(((noisy > 0) == (labels > 0)).float().mean()),
        "weight on words that tell": float((weights * (texts < 2 * TELLING)).sum(1).mean()),
    }


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = {
        f"{name}, {way}": x for way, method in WAYS.items() for name, x in judged(trained(method, seed), seed).items()
    }
    alike = "weights and gradients, "
    return found[alike + "adversarial"] - max(found[alike + "plain"], found[alike + "drawn"]), found


CLAIM = Claim(
    key="P192",
    method="AttentionAT",
    says="After adversarial training of attention, weights go along more closely with how much words matter by "
    "gradients.",
    paper_number="stronger correlation on all ten tasks (abstract, without numbers)",
    setup=f"{TEXTS} texts of {LENGTH} words, {TELLING} words tell of each of two classes; a recurrent net pooled by "
    f"one head, {EPOCHS} epochs, plain, with nudges of norm {SIZE:g} along the gradient, in drawn directions, and "
    "against the gradient. Correlation of a text's weights with norms of the answer's gradient by word; accuracy, "
    f"plain and with noise of {NOISE:g} on scores, is among the details.",
    effect="mean correlation, less the higher of plain training's and of drawn nudges'",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
