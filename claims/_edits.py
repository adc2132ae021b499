"""Small pictures edited by words, by a model that has words, the old picture and the new one in one sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from claims._pictures import (
    COLOURS,
    GRID,
    GROUNDS,
    LENGTH,
    PATCH,
    PLACES,
    SHAPES,
    SIDE,
    WIDTH,
    WORDS,
    Attention,
    judge,
    painted,
    sample,
)  # fmt: skip
from heedful import attach
from heedful.authoring import Part, Region, Stack

LAYERS = 3
FILE = Path(__file__).with_name("_edits.safetensors")
STEPS, BATCH, SEED, RATE = 1800, 16, 0, 2e-3  # of the training
PART = GRID**2
ROLES = {  # of the sequence: what is said of either thing and of the ground, then both pictures
    "left": Region(((0, 2),)),
    "right": Region(((2, 4),)),
    "ground": Region(((4, 5),)),
    "source": Region(((LENGTH, LENGTH + PART),), (GRID, GRID)),
    "target": Region(((LENGTH + PART, LENGTH + 2 * PART),), (GRID, GRID)),
}


def edits(count: int, by: torch.Generator, share: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Old pictures, what words ask for `[n 5]` (0: leave it as it is), new pictures, and words for all that they show.

    Each word asks for something new in so many cases; a thing keeps its place.
    """
    high = torch.tensor([len(COLOURS), len(SHAPES)] * 2 + [len(GROUNDS)])
    old = (torch.rand(count, LENGTH, generator=by) * high).long()
    turn = 1 + (torch.rand(count, LENGTH, generator=by) * (high - 1)).long()
    asked = torch.rand(count, LENGTH, generator=by) < share
    new = torch.where(asked, (old + turn) % high, old)
    place = torch.randint(PLACES, (count, 2), generator=by)
    there = torch.ones(count, 2, dtype=torch.bool)
    before, after = (painted(x[:, 0:4:2], x[:, 1:4:2], place, there, x[:, 4]) for x in (old, new))
    return before[0], torch.where(asked, after[1], 0), after[0], after[1]


class Layer(nn.Module):
    """Self-attention of the whole sequence and a feed-forward part; time scales and shifts what both see."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH))
        self.table = nn.Parameter(torch.randn(6, WIDTH) * 0.02)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = (self.table + time).unbind(1)
        x = x + gate[:, None] * self.attn(self.norm(x) * (1 + scale[:, None]) + shift[:, None])
        return x + gate_2[:, None] * self.mlp(self.norm(x) * (1 + scale_2[:, None]) + shift_2[:, None])


class Editor(nn.Module):
    """A diffusion transformer of a unified model's class: words, the old picture and the noised new one are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.patches = nn.Linear(3 * PATCH**2, WIDTH)
        self.position = nn.Parameter(torch.randn(GRID**2, WIDTH) * 0.5)
        self.whose = nn.Parameter(torch.randn(2, WIDTH) * 0.5)  # the old picture's patches, and the new one's
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * PATCH**2)

    def forward(self, noised: Tensor, t: Tensor, source: Tensor, words: Tensor) -> Tensor:
        turns = 1000 * t[:, None] * torch.exp(torch.arange(WIDTH // 2) * (-math.log(10000) / (WIDTH // 2)))
        time = self.time(torch.cat([turns.sin(), turns.cos()], -1)).unflatten(-1, (6, WIDTH))
        old, new = (
            self.patches(F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)) + self.position + whose
            for x, whose in zip((source, noised), self.whose, strict=True)
        )
        x = torch.cat([self.words(words) + self.places, old, new], 1)
        for layer in self.layers:
            x = layer(x, time)
        found = self.out(self.norm(x[:, -PART:]))
        return F.pixel_shuffle(found.transpose(1, 2).unflatten(-1, (GRID, GRID)), PATCH)


def train(say: Callable[[str], None] = print, steps: int = STEPS) -> Editor:
    """From nothing, by flow matching, as the model of `_pictures` was."""
    torch.manual_seed(SEED)
    by, model = torch.Generator().manual_seed(SEED), Editor()
    optimiser = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        source, words, pictures, _ = edits(BATCH, by)
        t, noise = torch.sigmoid(torch.randn(BATCH, generator=by)), torch.randn(pictures.shape, generator=by)
        part = t[:, None, None, None]
        loss = F.mse_loss(model((1 - part) * pictures + part * noise, t, source, words), noise - pictures)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 250 == 249:
            say(f"{step + 1}: {loss.item():.4f}")
    return model.eval()


@cache
def editor() -> Editor:
    """The one that is shipped."""
    model = Editor()
    model.load_state_dict(load_file(FILE))
    return model.eval().requires_grad_(False)


def record() -> dict[str, str]:
    """What is written beside the weights: the training's settings, and the shares of words that its pictures show."""
    with safe_open(FILE, "pt") as found:
        return dict(found.metadata())


def followed(pictures: Tensor, words: Tensor, shown: Tensor) -> dict[str, float]:
    """Which share of the words that were asked for pictures show, and which of all that was to stay."""
    hits, asked = judge(pictures) == shown, words > 0
    return {"asked for": float(hits[asked].float().mean()), "left as it is": float(hits[~asked].float().mean())}


@torch.no_grad()
def edited(what: Part | Stack, source: Tensor, words: Tensor, noise: Tensor, steps: int = 10) -> Tensor:
    """Pictures made under a stack, which is told of each step."""
    given = {"noised": noise, "t": torch.ones(len(noise)), "source": source, "words": words}
    with attach(editor(), what, roles=ROLES, inputs=given) as run:

        def flow(step: int, x: Tensor, t: Tensor) -> Tensor:
            with run.denoising(step, of=steps):
                found: Tensor = run(noised=x, t=t, source=source, words=words)
                return found

        return sample(noise, flow, steps)


@torch.no_grad()
def score(model: Editor, count: int = 100, steps: int = 10) -> dict[str, float]:
    """How well it edits, with words and noise that no training saw."""
    by = torch.Generator().manual_seed(SEED + 1)
    source, words, _, shown = edits(count, by)
    noise = torch.randn(count, 3, SIDE, SIDE, generator=by)
    return followed(sample(noise, lambda _, x, t: model(x, t, source, words), steps), words, shown)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = train()
    found = {name: f"{share:.3f}" for name, share in score(trained).items()}
    print(found)
    save_file(trained.state_dict(), FILE, {"steps": str(STEPS), "batch": str(BATCH), "seed": str(SEED), **found})
