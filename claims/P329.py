"""LlamaFusion: does a text model learn to read images by weights of their own, and stay the text model that it was?"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from claims._digits import digits
from claims._lab import BYTES, LAB
from claims.ledger import Claim, run
from heedful import attach
from heedful.authoring import Call, Mask, Site, at
from heedful.engine.run import Run
from heedful.laboratory.language import text
from heedful.methods import LlamaFusion

PATCHES, PIXELS = 16, 4  # of an image, and of a patch
STEPS, BATCH, TEXTS, RATE, HELD_OUT = 160, 32, 4, 3e-3, 400
ROLES = {"image": ((0, PATCHES),)}


class _Shared(LlamaFusion):
    """The control: as many weights, added for tokens of text too."""

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.MASK)
    def open(self, mask: Mask, call: Call) -> Mask:
        return super().open(mask, call) if self.role in call.roles else mask

    def beside(self, part: str, x: Tensor, call: Call) -> Tensor:
        return linear(x, call.params[part])


@dataclass(frozen=True)
class Way:
    method: LlamaFusion
    texts: bool  # whether it is shown texts too, so that it keeps to them


WAYS = {
    "own": Way(LlamaFusion(), False),
    "shared, with texts": Way(_Shared(), True),
}


class _Eye(nn.Module):
    """Patches made into tokens, which is learned in all ways alike."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(PIXELS, BYTES.width)
        self.place = nn.Parameter(torch.randn(PATCHES, BYTES.width) / 2)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unflatten(2, (4, 2)).unflatten(1, (4, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.patch(patches) + self.place


def read(under: Run, eye: _Eye, images: Tensor) -> Tensor:
    """Logits of the ten digits behind each image."""
    under.roles = ROLES
    model: Any = under.model
    sign = model.get_input_embeddings()(torch.full((len(images), 1), ord("=")))
    logits = under(inputs_embeds=torch.cat([eye(images), sign], 1), use_cache=False).logits
    return logits[:, -1, ord("0") : ord("9") + 1]


def surprise(under: Run, ids: Tensor) -> Tensor:
    under.roles = {}
    logits = under(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def texts(seed: int, random: torch.Generator, rows: int, held_out: bool) -> Tensor:
    data = text(seed % 10, held_out)
    starts = torch.randint(0, len(data) - BYTES.length, (rows,), generator=random)
    return torch.stack([data[i : i + BYTES.length] for i in starts.tolist()])


def taught(base: nn.Module, way: Way, seed: int) -> tuple[float, float]:
    """The share of held-out digits named rightly, and the loss on held-out text."""
    model, random = copy.deepcopy(base).requires_grad_(False), torch.Generator().manual_seed(seed)
    images, labels = digits()
    order = torch.randperm(len(images), generator=random)
    kept, tried = order[HELD_OUT:], order[:HELD_OUT]
    with attach(model, way.method, roles=ROLES) as under:
        torch.manual_seed(seed)
        eye = _Eye()
        learns = [*under.parameters(), *eye.parameters()]
        optimiser = torch.optim.AdamW(learns, lr=RATE, weight_decay=0.01)
        for step in range(STEPS):
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
            chosen = kept[torch.randint(len(kept), (BATCH,), generator=random)]
            optimiser.zero_grad()
            loss = cross_entropy(read(under, eye, images[chosen]), labels[chosen])
            if way.texts:
                loss = loss + surprise(under, texts(seed, random, TEXTS, held_out=False))
            loss.backward()
            nn.utils.clip_grad_norm_(learns, 1.0)
            optimiser.step()
        with torch.no_grad():
            right = read(under, eye, images[tried]).argmax(-1) == labels[tried]
            held = texts(seed, torch.Generator().manual_seed(10_000 + seed), 64, held_out=True)
            return float(right.float().mean()), float(surprise(under, held))


def measure(seed: int) -> tuple[float, dict[str, float]]:
    with LAB.opened(BYTES, None, seed) as opened:
        base = copy.deepcopy(opened.model)
    found = {}
    for name, way in WAYS.items():
        found[f"right, {name}"], found[f"text loss, {name}"] = taught(base, way, seed)
    return found["right, own"] - found["right, shared, with texts"], found


CLAIM = Claim(
    key="P329",
    method="LlamaFusion",
    says="A frozen text model learns to read images by weights of their own better than by weights that texts share, "
    "and stays the text model that it was.",
    paper_number="+20 % on image understanding at half the operations, language kept (abstract)",
    setup=f"The lab's softmax model of bytes, {BYTES.steps} steps, frozen; scikit-learn's digits as {PATCHES} patches "
    f"and a sign behind which the digit is named; {STEPS} steps of {BATCH}, in which what makes tokens of patches "
    "learns, and what is added to attention's projections: for images alone, or for all tokens, with "
    f"{TEXTS} texts a step beside so that texts are kept. Tried on {HELD_OUT} held-out digits and on held-out "
    "text. (After one seed patches took the place of single pixels, from which one way that was looked at learned "
    "nothing, and two controls were dropped.)",
    effect="share of digits named rightly by weights of images' own, less by shared ones that are shown texts too",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
