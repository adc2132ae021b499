"""A net that writes each word of a source once or several times: what goes from place to place is tried on it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from heedful import Method
from heedful.methods import EdgePrior
from heedful.nn import Attention

WORDS, START, UNGRADED = 9, 9, -100  # words 0 to 2 are written once, 3 to 5 twice, 6 to 8 three times
SHORT, LONG = (3, 6), (18, 18)  # words of a source
WIDTH, BATCH, STEPS, RATE, TRIED = 64, 32, 600, 3e-3, 128
TASK = (
    f"Words to be written once, twice or three times each; sources of {SHORT[0]} to {SHORT[1]} words in training, and "
    f"of {LONG[1]} in the end. Recurrent nets that read and write, {WIDTH} wide, and one head between them, {STEPS} "
    f"steps of {BATCH}: "
)


def drawn(random: torch.Generator, rows: int, lengths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sources of one length `[b k]`, and what is to be written `[b n]`, filled up with what is not graded."""
    length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=random))
    source = torch.randint(WORDS, (rows, length), generator=random)
    written = [words.repeat_interleave(1 + words // 3) for words in source]
    return source, nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=UNGRADED)


class Copier(nn.Module):
    """Recurrent nets that read and write, and attention of one head between them."""

    def __init__(self, method: Method | None) -> None:
        super().__init__()
        self.words, self.before = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS + 1, WIDTH)
        self.reader = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.writer = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(2 * WIDTH, WORDS)
        self.attention = Attention(WIDTH, 1, method, batch_first=True)

    def forward(self, source: Tensor, wanted: Tensor) -> Tensor:
        """Logits `[b n words]`; each word is told those that should have been written before it."""
        before = torch.cat([torch.full_like(wanted[:, :1], START), wanted[:, :-1].clamp(min=0)], 1)
        read, _ = self.reader(self.words(source))
        state, _ = self.writer(self.before(before))
        return self.out(torch.cat([state, self.attention(state, read, read, need_weights=False)[0]], -1))


def right(method: Method | None, seed: int) -> dict[str, float]:
    """The shares of words that are right, on sources as long as in training and on longer ones."""
    torch.manual_seed(seed)
    model, random = Copier(method), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        source, wanted = drawn(random, BATCH, SHORT)
        optimiser.zero_grad()
        logits = model(source, wanted)
        nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=UNGRADED).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        rates.step()
    found = {}
    with torch.no_grad():
        for name, lengths in (("short", (SHORT[1], SHORT[1])), ("long", LONG)):
            source, wanted = drawn(torch.Generator().manual_seed(10_000 + seed), TRIED, lengths)
            found[name] = float((model(source, wanted).argmax(-1) == wanted)[wanted >= 0].float().mean())
    return found


def beyond_content(way: str, ways: Mapping[str, Method], seed: int) -> tuple[float, dict[str, float]]:
    """How much more `way` gets right on longer sources than content, with and without distances; and all shares."""
    content = {"content": None, "content and distance": EdgePrior(0.0, 3 * LONG[1])}
    found = {}
    for tried, method in {**content, **ways}.items():
        found |= {f"{name}, {tried}": x for name, x in right(method, seed).items()}
    return found[f"long, {way}"] - max(found[f"long, {tried}"] for tried in content), found
