"""Pointer networks: does a net that points write the order of more numbers than it was ever given in training?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from claims.ledger import Claim, run
from heedful import Method
from heedful.methods import PointerNetwork
from heedful.nn import Attention

SHORT, LONG = (5, 10), (15, 15)  # numbers of a set
WIDTH, BATCH, STEPS, RATE, TRIED = 64, 32, 400, 5e-3, 256


def drawn(random: torch.Generator, rows: int, lengths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """As many numbers from 0 to 1 in each row `[b n]`, and their places from the least to the greatest."""
    length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=random))
    numbers = torch.rand(rows, length, generator=random)
    return numbers, numbers.argsort(-1)


class _Sorter(nn.Module):
    """A net that reads numbers, and one that is shown the number it should have named last; between them one head."""

    def __init__(self, method: Method | None, points: bool) -> None:
        super().__init__()
        self.points = points
        self.reader, self.writer = nn.LSTM(1, WIDTH, batch_first=True), nn.LSTM(1, WIDTH, batch_first=True)
        self.attention = Attention(WIDTH, 1, method, batch_first=True)
        self.places = nn.Linear(2 * WIDTH, LONG[1])  # the control: a fixed set of places

    def forward(self, numbers: Tensor, order: Tensor) -> Tensor:
        """Logits of places `[b n places]`."""
        read, state = self.reader(numbers[..., None])
        before = numbers.gather(1, order)[:, :-1]
        before = torch.cat([torch.full_like(before[:, :1], -1.0), before], 1)
        told, _ = self.writer(before[..., None], state)
        mixed, weights = self.attention(told, read, read, need_weights=True)
        if self.points:
            return weights.clamp(min=1e-9).log()
        return self.places(torch.cat([told, mixed], -1))


WAYS: dict[str, tuple[Method | None, bool]] = {
    "points": (PointerNetwork(WIDTH), True),
    "points by products": (None, True),
    "fixed places": (PointerNetwork(WIDTH), False),
}


def right(way: str, seed: int) -> dict[str, float]:
    """The shares of places that are right, among as many numbers as in training and among more."""
    torch.manual_seed(seed)
    model, random = _Sorter(*WAYS[way]), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        numbers, order = drawn(random, BATCH, SHORT)
        optimiser.zero_grad()
        logits = model(numbers, order)
        nn.functional.cross_entropy(logits.flatten(0, 1), order.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimiser.step()
        rates.step()
    found = {}
    with torch.no_grad():
        for name, lengths in (("short", (SHORT[1], SHORT[1])), ("long", LONG)):
            numbers, order = drawn(torch.Generator().manual_seed(10_000 + seed), TRIED, lengths)
            found[name] = float((model(numbers, order).argmax(-1) == order).float().mean())
    return found


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = {f"{name}, {way}": x for way in WAYS for name, x in right(way, seed).items()}
    return found["long, points"] - found["long, fixed places"], found


CLAIM = Claim(
    key="P060",
    method="PointerNetwork",
    says="A net whose attention is its answer goes on beyond the lengths that it was trained on, which a net with a "
    "fixed set of answers cannot.",
    paper_number="generalises beyond the greatest lengths in training (abstract, without numbers)",
    setup=f"Numbers to be named from the least to the greatest: {SHORT[0]} to {SHORT[1]} of them in training, "
    f"{LONG[1]} in the end. Recurrent nets that read and name, {WIDTH} wide, {STEPS} steps of {BATCH}, each told the "
    "right ones so far. The answer is the pattern of additive scores, that of products, or one of "
    f"{LONG[1]} places by a linear map behind additive attention; the share of places right. "
    "(Steps and batch were made fewer for time after runs of two other seeds.)",
    effect="share of places right among more numbers than in training, pointing, less with fixed places",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
