"""BoQ: does what bags of learned queries pool of a view find its place again more often than means of patches do?"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, normalize
from transformers import ViTConfig, ViTModel

from claims._pooled import MeanPatch
from claims._scenes import picture
from claims.ledger import Claim, run
from heedful import attach
from heedful.authoring import Layer, Method
from heedful.methods import BoQ

SIDE, WIDTH, LAYERS = 24, 48, 2  # pixels of a view; of the model, and 36 patches
STEPS, PLACES, RATE, HEAT = 150, 16, 2e-3, 0.1  # places in a batch, with two views of each
APART, STRIPS, MARGIN = 24, 5, 36  # pixels between places; strips of the picture, one unseen a seed; to a border
SIZE, JITTER = (36, 56), 4  # pixels of the picture in a view, and how far it is off its place


class _Refined(BoQ):
    """A control: the same blocks without queries, the mean of the patches behind each."""

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {name: x for name, x in super().parameters(layer).items() if "quer" not in name}

    def _asked(self, p: dict[str, Tensor], i: int, x: Tensor, heads: int) -> Tensor:
        return x.mean(1, keepdim=True).expand(-1, self.queries, -1)


BAGS = BoQ(8)
WAYS = {"BoQ": BAGS, "mean": MeanPatch(), "refined mean": _Refined(8)}


def _places(seed: int) -> tuple[Tensor, Tensor]:
    """Where places are `[n 2]`, in pixels down and across: those to train on, and those of the strip never seen."""
    rows, cols = picture("china").shape[1:]
    grid = torch.cartesian_prod(torch.arange(MARGIN, rows - MARGIN, APART), torch.arange(MARGIN, cols - MARGIN, APART))
    left, right = MARGIN + (cols - 2 * MARGIN) * seed / STRIPS, MARGIN + (cols - 2 * MARGIN) * (seed + 1) / STRIPS
    tried = (grid[:, 1] >= left) & (grid[:, 1] < right)
    near = (grid[:, 1] >= left - 2 * MARGIN) & (grid[:, 1] < right + 2 * MARGIN)  # a view of these shows the strip
    return grid[~near], grid[tried]


def _views(places: Tensor, random: torch.Generator) -> Tensor:
    """One view of each place, `[n 3 24 24]`: some size, off its place, and in some light."""
    whole, out = picture("china"), []
    for place in places.tolist():
        half = int(torch.randint(*SIZE, (), generator=random)) // 2
        down, across = (
            min(max(at + int(torch.randint(-JITTER, JITTER + 1, (), generator=random)), half), n - half)
            for at, n in zip(place, whole.shape[1:], strict=True)
        )
        view = whole[:, down - half : down + half, across - half : across + half]
        light, contrast = 0.5 * torch.randn(3, 1, 1, generator=random), 0.7 + 0.6 * torch.rand((), generator=random)
        out.append(interpolate(view[None], (SIDE, SIDE), mode="bilinear", antialias=True)[0] * contrast + light)
    return torch.stack(out)


def _found_again(what: Method, seed: int) -> float:
    """The share of places never seen whose other view is the nearest of all of the strip's, after training."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=SIDE, patch_size=4, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, initializer_range=0.1, attn_implementation="sdpa",
    )  # fmt: skip
    seen, tried = _places(seed)
    with attach(ViTModel(config, add_pooling_layer=False), what.on(layers=LAYERS - 1)) as model:
        optimiser = torch.optim.AdamW(model.model.parameters(), lr=RATE, weight_decay=0.01)

        def described(views: Tensor) -> Tensor:
            return normalize(model(pixel_values=views).last_hidden_state[:, 0], dim=-1)

        for step in range(STEPS):
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            chosen = seen[torch.randperm(len(seen), generator=random)[:PLACES]]
            one, other = described(torch.cat([_views(chosen, random) for _ in range(2)])).chunk(2)
            alike, own = one @ other.mT / HEAT, torch.arange(PLACES)
            optimiser.zero_grad()
            (cross_entropy(alike, own) + cross_entropy(alike.mT, own)).backward()
            torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
            optimiser.step()
        views = torch.Generator().manual_seed(1000 + seed)
        with torch.no_grad():
            asked, known = described(torch.cat([_views(tried, views) for _ in range(2)])).chunk(2)
    return float(((asked @ known.mT).argmax(-1) == torch.arange(len(tried))).float().mean())


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = {f"recall, {name}": _found_again(what, seed) for name, what in WAYS.items()}
    others = max(found["recall, mean"], found["recall, refined mean"])
    return 100 * (found["recall, BoQ"] - others), found


CLAIM = Claim(
    key="P263",
    method="BoQ",
    says="A place is found again more often by what bags of learned queries pool of its image than by other pooling.",
    paper_number="recall at 1 above NetVLAD's, MixVPR's and EigenPlaces' on 14 benchmarks (abstract)",
    setup=f"Views of {SIDE} x {SIDE} pixels, of some size, light and place, of a photograph of a palace; a vision "
    f"transformer of {LAYERS} layers and width {WIDTH} with two bags of {BAGS.queries} queries, the mean of its "
    f"patches, or the same blocks and means without queries, trained {STEPS} steps to tell {PLACES} places apart. How "
    f"often another view of a place is the nearest, among all places {APART} pixels apart of a strip of the picture "
    "that was not trained on, another one each seed. In a first run views were off their places by more "
    "than these are apart: recalls of 1 to 9 %, no difference. That was mended, and one training with bags seen, "
    "before this run.",
    effect="points of recall at 1 above the better of the two means",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
