"""Small pictures of two coloured things named by words, a denoiser trained on them, and a judge without a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIDE, PATCH, WIDTH, HEADS, LAYERS, LENGTH = 16, 2, 64, 4, 3, 5
RADIUS, HALF = 3, SIDE // 2  # a thing is 7 wide, and stays in its half
GRID = SIDE // PATCH
PLACES = (SIDE - 2 * RADIUS) * (HALF - 2 * RADIUS)  # where a thing may stand in its half
COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 0.8, 0.0), "blue": (0.1, 0.2, 1.0), "yellow": (1.0, 0.9, 0.0)}
SHAPES = ("square", "disc", "cross", "frame")
GROUNDS = {"dark": 0.15, "grey": 0.5, "light": 0.85}
WORDS = ("", "nothing", *COLOURS, *SHAPES, *GROUNDS)
ID = {word: number for number, word in enumerate(WORDS)}
CONCEPTS = {"colour": (0, 2), "shape": (1, 3), "ground": (4,)}  # and which of a picture's words are theirs
FILE = Path(__file__).with_name("_pictures.safetensors")
STEPS, BATCH, SEED, RATE = 5800, 32, 0, 2e-3  # of the training


def outline(shape: int, dx: Tensor, dy: Tensor) -> Tensor:
    """Which places, so far from its middle, a shape covers."""
    near, far = torch.minimum(dx.abs(), dy.abs()), torch.maximum(dx.abs(), dy.abs())
    covers = (far <= RADIUS, dx**2 + dy**2 <= RADIUS**2 + 1, (near <= 1) & (far <= RADIUS), (far <= RADIUS) & (far > 1))
    return covers[shape]


def things(shape: int) -> Tensor:
    """What a shape covers of its half wherever it may stand, `[places 16 8]`."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(HALF), indexing="ij")
    rows, cols = torch.arange(RADIUS, SIDE - RADIUS), torch.arange(RADIUS, HALF - RADIUS)
    row, col = (place.flatten()[:, None, None] for place in torch.meshgrid(rows, cols, indexing="ij"))
    return outline(shape, x - col, y - row)


def draw(count: int, by: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures from -1 to 1 `[n 3 16 16]`, their words `[n 5]`, and where each thing stands `[n 2 16 16]`.

    The words are colour and shape of what is on the left, of what is on the right, and the ground. A half in four is
    empty, and two words say so.
    """

    def pick(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=by)

    colour, shape, ground = pick(len(COLOURS), count, 2), pick(len(SHAPES), count, 2), pick(len(GROUNDS), count)
    place, there = pick(PLACES, count, 2), torch.rand(count, 2, generator=by) < 0.75
    return painted(colour, shape, place, there, ground)


def painted(
    colour: Tensor, shape: Tensor, place: Tensor, there: Tensor, ground: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of what is chosen: of either thing `[n 2]` colour, shape, where, and whether; and the ground `[n]`."""
    every = torch.stack([things(kind) for kind in range(len(SHAPES))])  # [shapes places 16 8]
    count = len(ground)
    half = every[shape, place] & there[..., None, None]
    covered = torch.zeros(count, 2, SIDE, SIDE, dtype=torch.bool)
    covered[:, 0, :, :HALF], covered[:, 1, :, HALF:] = half[:, 0], half[:, 1]
    paint = torch.tensor(list(COLOURS.values()))[colour]
    picture = torch.tensor(list(GROUNDS.values()))[ground][:, None, None, None].expand(count, 3, SIDE, SIDE)
    for side in (0, 1):
        picture = torch.where(covered[:, side, None], paint[:, side, :, None, None], picture)
    words = torch.where(there[..., None], torch.stack([colour + ID["red"], shape + ID["square"]], -1), ID["nothing"])
    return picture * 2 - 1, torch.cat([words.flatten(1), ground[:, None] + ID["dark"]], 1), covered


def judge(pictures: Tensor) -> Tensor:
    """The words `[n 5]` of the picture that comes nearest, among all that can be."""
    each, named = [], []
    for ground, light in enumerate(GROUNDS.values()):
        halves, words = [torch.full((1, 3, SIDE, HALF), light)], [(ID["nothing"], ID["nothing"])]
        for shape in range(len(SHAPES)):
            where = things(shape)[:, None]
            for colour, paint in enumerate(COLOURS.values()):
                halves.append(torch.where(where, torch.tensor(paint)[:, None, None], light))
                words += [(ID["red"] + colour, ID["square"] + shape)] * len(where)
        found = torch.cat(halves).flatten(1) * 2 - 1
        sides = torch.stack(pictures.split(HALF, -1), 1).flatten(2)  # [n 2 e]
        far = torch.cdist(sides, found.expand(len(sides), -1, -1)).square()
        nearest = far.min(-1)
        each.append(nearest.values.sum(-1))
        said = torch.tensor(words)[nearest.indices].flatten(1)
        named.append(torch.cat([said, torch.full((len(said), 1), ID["dark"] + ground)], 1))
    best = torch.stack(each).argmin(0)
    return torch.stack(named)[best, torch.arange(len(best))]


def off_ground(pictures: Tensor, words: Tensor) -> Tensor:
    """Where pictures are not the ground that their words name, `[n 16 16]`."""
    light = torch.tensor(list(GROUNDS.values()))[words[:, 4] - ID["dark"]] * 2 - 1
    return (pictures - light[:, None, None, None]).abs().mean(1) > 0.25


def right(pictures: Tensor, words: Tensor) -> dict[str, float]:
    """Which share of the words of each concept the pictures show."""
    hits = (judge(pictures) == words).float()
    return {concept: float(hits[:, list(places)].mean()) for concept, places in CONCEPTS.items()}


class Attention(nn.Module):
    """Self-attention, or cross-attention to `context`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = self.q(x), *self.kv(x if context is None else context).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and a feed-forward part; time scales and shifts what the first and last see."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn, self.cross = Attention(), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH))
        self.table = nn.Parameter(torch.randn(6, WIDTH) * 0.02)

    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = (self.table + time).unbind(1)
        x = x + gate[:, None] * self.attn(self.norm(x) * (1 + scale[:, None]) + shift[:, None])
        x = x + self.cross(self.norm(x), context=context)
        return x + gate_2[:, None] * self.mlp(self.norm(x) * (1 + scale_2[:, None]) + shift_2[:, None])


class Denoiser(nn.Module):
    """A diffusion transformer that tells the way from picture to noise, for noised pictures `[b 3 16 16]`."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH))  # the place of a word tells whose it is
        self.patches = nn.Linear(3 * PATCH**2, WIDTH)
        self.position = nn.Parameter(torch.randn(GRID**2, WIDTH) * 0.5)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * PATCH**2)

    def read(self, words: Tensor) -> Tensor:
        """Words `[b 5]` as the cross-attention sees them, `[b 5 e]`."""
        return self.words(words) + self.places

    def forward(self, noised: Tensor, t: Tensor, context: Tensor) -> Tensor:
        turns = 1000 * t[:, None] * torch.exp(torch.arange(WIDTH // 2) * (-math.log(10000) / (WIDTH // 2)))
        time = self.time(torch.cat([turns.sin(), turns.cos()], -1)).unflatten(-1, (6, WIDTH))
        x = self.patches(F.pixel_unshuffle(noised, PATCH).flatten(2).transpose(1, 2)) + self.position
        for block in self.blocks:
            x = block(x, context, time)
        return F.pixel_shuffle(self.out(self.norm(x)).transpose(1, 2).unflatten(-1, (GRID, GRID)), PATCH)


def train(say: Callable[[str], None] = print) -> Denoiser:
    """From nothing, by flow matching: the loss is that of `noise - picture` told from their mixture."""
    torch.manual_seed(SEED)
    by, model = torch.Generator().manual_seed(SEED), Denoiser()
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.99), weight_decay=0.0)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * step / STEPS))
        pictures, words, _ = draw(BATCH, by)
        words[torch.rand(BATCH, generator=by) < 0.15] = 0  # so that it draws without words too
        t, noise = torch.sigmoid(torch.randn(BATCH, generator=by)), torch.randn(pictures.shape, generator=by)
        part = t[:, None, None, None]
        loss = F.mse_loss(model((1 - part) * pictures + part * noise, t, model.read(words)), noise - pictures)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        for name, p in model.named_parameters():
            mean[name].lerp_(p.detach(), 1 - min(0.998, (1 + step) / (10 + step)))
        if step % 500 == 499:
            say(f"{step + 1}: {loss.item():.4f}")
    model.load_state_dict(mean)
    return model.eval()


@torch.no_grad()
def sample(
    noised: Tensor,
    flow: Callable[[int, Tensor, Tensor], Tensor],
    steps: int,
    start: float = 1.0,
    after: Callable[[float, Tensor], Tensor] = lambda t, x: x,
    before: Callable[[int, Tensor, Tensor], Tensor] = lambda step, x, t: x,
) -> Tensor:
    """Pictures from noised ones, along `flow(step, x, t)`.

    `before(step, x, t)` is what each step begins with, and `after(t, x)` what it leaves.
    """
    times = torch.linspace(start, 0, steps + 1).tolist()
    for step, (t, then) in enumerate(pairwise(times)):
        now = torch.full((len(noised),), t)
        noised = before(step, noised, now)
        noised = after(then, noised + (then - t) * flow(step, noised, now))
    return noised


@cache
def denoiser() -> Denoiser:
    """The one that is shipped."""
    model = Denoiser()
    model.load_state_dict(load_file(FILE))
    return model.eval().requires_grad_(False)


def record() -> dict[str, str]:
    """What is written beside the weights: the training's settings, and the share of words that its pictures show."""
    with safe_open(FILE, "pt") as found:
        return dict(found.metadata())


def score(model: Denoiser, count: int = 500, steps: int = 20) -> dict[str, float]:
    """How well it draws what it is told, without guidance, for words and noise that no training saw."""
    by = torch.Generator().manual_seed(SEED + 1)
    _, words, _ = draw(count, by)
    context = model.read(words)
    pictures = sample(
        torch.randn(count, 3, SIDE, SIDE, generator=by), lambda _, x, t: model(noised=x, t=t, context=context), steps
    )
    return right(pictures, words)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = train()
    found = {name: f"{share:.3f}" for name, share in score(trained).items()}
    print(found)
    save_file(trained.state_dict(), FILE, {"steps": str(STEPS), "batch": str(BATCH), "seed": str(SEED), **found})
