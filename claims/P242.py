"""NestedAttention: is a thing of two colours drawn better by a word whose value depends on the place that asks?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from claims._pictures import HALF, ID, SIDE, denoiser, things
from claims.ledger import Claim, run
from heedful import attach
from heedful.methods import NestedAttention

PICTURES, LEARN, RATE, BATCH, TIMES = 8, 60, 0.1, 12, (0.8, 0.6, 0.4, 0.2)
LAYERS = (1, 3, 5)  # those of cross-attention among the denoiser's
UPPER, LOWER, LIGHT = (0.9, 0.2, 0.9), (0.1, 0.9, 0.9), 0.5  # colours that no word names, and the ground
ROLES = {"subject": ((0, 1),)}


class _Even(NestedAttention):
    """The same tokens, all taken alike by every place."""

    def weights(self, scores: Tensor) -> Tensor:
        return torch.full_like(scores, 1 / self.tokens)


def _pictures(by: torch.Generator) -> tuple[Tensor, Tensor]:
    """A square on the left whose upper half has another colour than the lower, and where it is `[n 16 16]`."""
    every = things(0)
    where = torch.zeros(PICTURES, SIDE, SIDE, dtype=torch.bool)
    where[..., :HALF] = every[torch.randint(len(every), (PICTURES,), generator=by)]
    row = torch.arange(SIDE)[None, :, None]
    middle = (where * row).sum((1, 2)) / where.sum((1, 2))
    upper = row < middle[:, None, None]
    picture = torch.full((PICTURES, 3, SIDE, SIDE), LIGHT)
    for paint, part in ((UPPER, where & upper), (LOWER, where & ~upper)):
        picture = torch.where(part[:, None], torch.tensor(paint)[:, None, None], picture)
    return picture * 2 - 1, where


def _context(count: int) -> Tensor:
    """A prompt of the subject's word, whose value is not used, and that of its shape; nothing on the right."""
    words = torch.tensor([[ID["red"], ID["square"], ID["nothing"], ID["nothing"], ID["grey"]]])
    return denoiser().read(words).expand(count, -1, -1)


def _missed(method: NestedAttention, seed: int) -> tuple[float, float]:
    """The error of what is denoised within the thing, and beside it, on pictures that were not learnt from."""
    by = torch.Generator().manual_seed(100 + seed)
    shown, _ = _pictures(by)
    tried, where = _pictures(by)
    given = {"noised": shown, "t": torch.ones(PICTURES), "context": _context(PICTURES)}
    with attach(denoiser(), method.on(layers=LAYERS), roles=ROLES, inputs=given) as run:
        optimiser = torch.optim.Adam(run.parameters(), RATE)
        for _ in range(LEARN):
            picked = torch.randint(PICTURES, (BATCH,), generator=by)
            pictures, t = shown[picked], torch.sigmoid(torch.randn(BATCH, generator=by))
            noise, part = torch.randn(pictures.shape, generator=by), t[:, None, None, None]
            told = run(noised=(1 - part) * pictures + part * noise, t=t, context=_context(BATCH))
            loss = F.mse_loss(told, noise - pictures)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        found = []
        with torch.no_grad():
            for t in TIMES:
                noise = torch.randn(tried.shape, generator=by)
                noised, now = (1 - t) * tried + t * noise, torch.full((PICTURES,), t)
                told = run(noised=noised, t=now, context=_context(PICTURES))
                found.append((told - (noise - tried)).square().mean(1))
    far = torch.stack(found).mean(0)
    return float(far[where].mean()), float(far[~where].mean())


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ways = {"nested": NestedAttention(), "one token": NestedAttention(tokens=1), "all tokens alike": _Even()}
    numbers: dict[str, float] = {}
    for name, method in ways.items():
        numbers[f"error in the thing, {name}"], numbers[f"error beside it, {name}"] = _missed(method, seed)
    best = min(numbers["error in the thing, one token"], numbers["error in the thing, all tokens alike"])
    return best - numbers["error in the thing, nested"], numbers


CLAIM = Claim(
    key="P242",
    method="NestedAttention",
    says="A word whose value depends on the place that asks renders a subject better than a word with one value.",
    paper_number="none in the abstract, which says that identity is kept well while prompts are followed",
    setup=f"A text-to-image transformer of 0.2M parameters, frozen, on 16 x 16 pictures instead of SDXL; the subject "
    "is a square whose upper half has one new colour and whose lower half another. "
    f"{NestedAttention().tokens} tokens a layer are learnt in {LEARN} steps from {PICTURES} drawn pictures a seed, and "
    f"{PICTURES} others, noised to {', '.join(map(str, TIMES))}, are denoised. Against one token, and as many that all "
    "places take alike.",
    effect="mean squared error of what is denoised within the thing, below that of the better of both controls",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
