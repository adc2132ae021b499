"""Latent monotonic attention: does a net that goes through its source write as well as one that sees all of it?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from claims._copier import WIDTH, WORDS, Copier
from claims.ledger import Claim, run
from heedful.authoring import Method
from heedful.methods import LatentMonotonicAttention

SHORT, LONG = (4, 7), 18  # words that are to be written
WINDOW, MARGIN = 4, 0.02  # places that a token sees; of the share right with soft attention
BATCH, BEFORE, AFTER, RATE, TRIED = 32, 300, 300, 3e-3, 128


class _Straight(LatentMonotonicAttention):
    """The control: windows as wide that go through the source at an even pace."""

    def walk(self, scores: Tensor, last: Tensor, moves: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        n, k = scores.shape[2:]
        places = torch.arange(1, n + 1) * k // n - 1
        return places.expand(scores.shape[:3]), places.expand(scores.shape[:3])

    def likeliest_path(
        self, scores: Tensor, ahead: Tensor, last: Tensor, moves: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.walk(scores, last, moves, start)


WAYS: dict[str, Method | None] = {
    "soft": None,
    "latent": LatentMonotonicAttention(WINDOW),
    "straight": _Straight(WINDOW, 0.0),
}


def drawn(random: torch.Generator, rows: int, count: int) -> tuple[Tensor, Tensor]:
    """Words to be written `[b n]`, no two neighbours alike, and a source `[b 3n]` that has each one to five times."""
    first = torch.randint(WORDS, (rows, 1), generator=random)
    apart = torch.randint(1, WORDS, (rows, count - 1), generator=random)
    wanted = torch.cat([first, apart], 1).cumsum(1) % WORDS
    more = torch.randint(3, (rows, count // 2), generator=random)
    lengths = torch.cat([3 + more, 3 - more, torch.full((rows, count % 2), 3)], 1)
    lengths = lengths.gather(1, torch.rand(rows, count, generator=random).argsort(1))
    pairs = zip(wanted, lengths, strict=True)
    return torch.stack([words.repeat_interleave(times) for words, times in pairs]), wanted


def taught(model: Copier, steps: int, random: torch.Generator) -> Copier:
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        count = int(torch.randint(SHORT[0], SHORT[1] + 1, (), generator=random))
        source, wanted = drawn(random, BATCH, count)
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(source, wanted).flatten(0, 1), wanted.flatten())
        method = model.attention.method.parts
        if any(isinstance(part, LatentMonotonicAttention) and part.weight for part in method):
            loss = loss + model.attention.run.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        rates.step()
    return model


@torch.no_grad()
def right(model: Copier, seed: int) -> dict[str, float]:
    model.eval()
    found = {}
    for name, count in (("short", SHORT[1]), ("long", LONG)):
        source, wanted = drawn(torch.Generator().manual_seed(10_000 + seed), TRIED, count)
        found[name] = float((model(source, wanted).argmax(-1) == wanted).float().mean())
    return found


def measure(seed: int) -> tuple[float, dict[str, float]]:
    torch.manual_seed(seed)
    base = taught(Copier(None), BEFORE, torch.Generator().manual_seed(seed)).state_dict()
    found = {}
    for way, method in WAYS.items():
        model = Copier(method)
        model.load_state_dict(base)
        taught(model, AFTER, torch.Generator().manual_seed(1_000_000 + seed))
        found |= {f"{name}, {way}": share for name, share in right(model, seed).items()}
    return found["short, latent"] - (1 - MARGIN) * found["short, soft"], found


CLAIM = Claim(
    key="P161",
    method="LatentMonotonicAttention",
    says="A model that is taught on to go through its source by a latent place, and sees a window around it, writes as "
    "well as one that goes on with soft attention to all of it.",
    paper_number="as good as global soft attention on Switchboard 300h (abstract, without numbers)",
    setup=f"Words to be written once, of a source that has each one to five times; {SHORT[0]} to {SHORT[1]} words in "
    f"training. Recurrent nets that read and write, {WIDTH} wide, and one head between them, {BEFORE} steps of {BATCH} "
    f"with soft attention, then {AFTER} more: with it, with windows of {WINDOW} places around a latent one, and with "
    "windows that go on at an even pace. A match is a share right at most 2 % below soft attention's, on "
    f"{SHORT[1]} words. Details: {LONG} words. Speech is not at hand.",
    effect="share of words right, latent, above that of soft attention less 2 %",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
