"""weight * JS(softmax m_c, softmax mask_c) over concepts, m_c from 0 to 1; masks are where norm(A^4) m_c^2 is ahead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, RoleName, ShareBelowOne
from heedful.kit.batches import read, with_roles
from heedful.kit.seeds import seed_of
from heedful.methods.intervene.diffusion._map_loss import MapLoss, levelled
from heedful.methods.intervene.diffusion._refined import Refined

PAPER = Paper(
    "P275",
    "AttenCraft: Attention-guided Disentanglement of Multiple Concepts for Text-to-Image Customization",
    "Junjie Shentu, Matthew Watson, Noura Al Moubayed",
    2024,
    "2405.17965",
    differs=(
        "Masks and the loss on them; the ratio in which concepts are sampled, and the losses that keep features, are "
        "not here.",
        "Masks are made once, by a fit, and stay; the authors make them anew while they train, where they stay alike.",
        "A concept is a span of words, whose maps are added up; the authors have a word for each, and for those that "
        "come with descriptions the highest of all words.",
        "Maps are averaged over the layers it is attached to, and then brought from 0 to 1; the authors bring layers "
        "of several sizes to 32 x 32, and each size from 0 to 1 first.",
    ),
)


class AttenCraft(MapLoss):
    """Each concept's words shall look at its own part of the picture, found by attention itself.

    `masks = heedful.fit(AttenCraft(), model, [inputs])` looks at noised pictures, with "roles" beside the inputs that
    name the concepts' words, a span each: `{"concepts": ((0, 2), (2, 4))}`. Attach it to train on the same pictures
    and add `run.loss()`. Places that no concept is ahead in belong to none.
    """

    paper = PAPER
    weight: NonNegativeFloat = 1.0  # beside the model's loss; the authors: 1
    threshold: ShareBelowOne = 0.1  # by how much a concept must be ahead of all others in its places; the authors: 0.1
    role: RoleName = "concepts"  # the words of concepts, a span each
    masks: Fitted | None = None  # "masks" [b c n]
    seed: int | None = None  # without a fit: random masks, as a control

    @classmethod
    def neutral(cls) -> AttenCraft:
        return cls(0.0, seed=0)

    @classmethod
    def example(cls) -> AttenCraft:
        return cls(role="marked", seed=0)

    def idle(self, call: Call) -> bool:
        return self.weight == 0 or super().idle(call)

    def loss(self, maps: Tensor, call: Call) -> Tensor:
        words = of_concepts(maps, call, self.role)
        p, q = levelled(words, (-1,)).softmax(-1), self._masks(words).softmax(-1)
        both = (p + q) / 2
        apart = (p * p.log() + q * q.log()).sum(-1) / 2 - (both * both.log()).sum(-1)
        return self.weight * apart.mean()

    def _masks(self, words: Tensor) -> Tensor:
        """Of maps `[b c n]` the places that are each concept's."""
        if self.masks is None:
            draw = torch.Generator().manual_seed(seed_of(self, "masks", "to the pictures", "[inputs]"))
            return torch.rand(words.shape, generator=draw).round().to(words)
        found = self.masks["masks"]
        if found.shape != words.shape:
            rule = f"is of other pictures: [b c n] is {list(found.shape)}, and here {list(words.shape)}"
            raise FieldError(self, "masks", self.masks, rule, "a fit to the same pictures")
        return found.to(words)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> AttenCraft:
        """Find the masks of the pictures, whose maps in all batches, as of several noises, are averaged."""
        good = [{"noised": "...", "roles": {self.role: ((0, 2), (2, 4))}}]  # a span for each concept's words
        maps = read(context, _Concepts(self.role), with_roles(self, batches, self.role, good=good))
        if len(shapes := {tuple(one.shape) for one in maps}) > 1:
            rule = "must be of the same pictures and concepts: [b c n] is different"
            raise FieldError(self, "batches", sorted(shapes), rule, "one picture under several noises")
        return replace(self, masks=Fitted({"masks": parted(torch.stack(maps).mean(0), self.threshold)}))


class _Concepts(Refined):
    """Each concept's map, squared and spread along self-attention, `[b c n]`."""

    paper = PAPER
    role: str = "concepts"

    def words(self, mean: Tensor, call: Call) -> Tensor:
        return of_concepts(mean, call, self.role)

    def refined(self, words: Tensor, places: Tensor) -> Tensor:
        near = torch.linalg.matrix_power(levelled(places, (-2, -1)), 4)
        near = levelled(near, (-2, -1))
        return levelled(levelled(words.square(), (-1,)) @ near.mT, (-1,))


def of_concepts(maps: Tensor, call: Call, role: str) -> Tensor:
    """What places give to the words of each concept, `[b c n]`, of what they give to words, `[b n k]`."""
    bounds, place = call.bounds(role), call.k_pos[:, 0, None]  # [b|1 c 2] and [b|1 1 k]
    inside = (place >= bounds[..., :1]) & (place < bounds[..., 1:])
    return inside.to(maps.dtype) @ maps.mT


def parted(maps: Tensor, threshold: float) -> Tensor:
    """Which places `[b c n]` are each concept's: those where its map is ahead of every other's by a threshold."""
    best = maps.topk(2, dim=1).values if maps.shape[1] > 1 else torch.cat([maps, torch.zeros_like(maps)], 1)
    return (maps == best[:, :1]) & (best[:, :1] - best[:, 1:] > threshold)


if __name__ == "__main__":
    from heedful import attach, fit, models

    model = models.tiny("bart")
    ids = torch.randint(3, 60, (1, 12))
    layers = tuple(f"model.decoder.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "encoder_attn"))
    roles = {"concepts": ((2, 4), (5, 6))}
    method = fit(AttenCraft(), model, [{"input_ids": ids, "decoder_input_ids": ids, "roles": roles}], only=layers)
    with attach(model, method, roles=roles, only=layers) as run:
        run(input_ids=ids, decoder_input_ids=ids)
        print(run.loss().item())
