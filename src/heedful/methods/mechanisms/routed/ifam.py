"""Layers find parts, m = [max_k softmax(-|x - a_k|^2) over the background's]; those behind begin anew and see m = 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from heedful.authoring import (
    Call,
    FieldError,
    Layer,
    Mask,
    Method,
    NonNegativeFloat,
    Paper,
    PositiveInt,
    ShareBelowOne,
    Site,
    at,
    penalises,
    reads,
)
from heedful.kit.chosen import Chosen
from heedful.kit.feature_maps import drawn
from heedful.kit.patches import patch_tokens, sides, whole_image
from heedful.methods.mechanisms.routed._parts import REACH, shaping


class IFAM(Method):
    """The first layers say which patches the rest may see, and the rest begin with the image. For models trained so.

    What is answered depends on the chosen patches alone, whatever the others hold, as long as these are chosen.
    """

    paper = Paper(
        "P070",
        "Inherently Faithful Attention Maps for Vision Transformers",
        "Ananthu Aniraj, Cassio F. Dantas, Dino Ienco, Diego Marcos",
        2025,
        "2506.08915",
        differs=(
            "One model's first layers are the first stage and its others the second, which begin with what entered the "
            "first layer; the authors have a whole model for each, both pretrained.",
            "The authors have the first stage answer too, and beside the losses that shape parts here, two that parts "
            "turn with the image and have features apart. Thresholds and parts taken away by hand are not here.",
            "Gradients reach the mask through the values of patches that are seen, as if these were multiplied with "
            "it; in the authors' code the hard mask is made a table of true and false, which hands none back.",
            "What parts are drawn by is drawn anew in training alone; in use it is the same for all images, as answers "
            "are to be the same again.",
            "Patches that are not seen are hidden as keys, and their rows computed; the authors drop most in use.",
            "In causal layers, and where the patches are no grid or not all are read at once, softmax stays.",
            "Parts are drawn as torch.nn.Conv2d draws them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    stage: PositiveInt = 6  # layers of the first stage; half of ViT-B/16
    parts: PositiveInt = 8  # that may be found, beside the background; the authors' code: 8
    drop: ShareBelowOne = 0.3  # share of parts that are not seen in a step of training; the authors' code: 0.3
    shape: NonNegativeFloat = 1.0  # of the losses that shape parts, beside the answer's; the authors' code: 1

    @classmethod
    def example(cls) -> IFAM:
        return cls(1, 2)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        if layer.number != self.stage - 1:
            return {}
        random, e = torch.Generator().manual_seed(layer.number), layer.width
        return {"parts": drawn(random, self.parts + 1, e), "norm": torch.ones(e), "norm_bias": torch.zeros(e)}

    def idle(self, call: Call) -> bool:
        return not whole_image(call) or not _all_here(call)

    @reads(Site.EMBEDDING)
    def keep(self, stream: Tensor, call: Call) -> None:
        call.state.forward["image"] = stream

    @at(Site.RESIDUAL)
    def divide(self, stream: Tensor, call: Call) -> Tensor:
        if call.layer != self.stage - 1 or "image" not in call.state.forward:
            return stream
        if call.last_layer:
            rule = f"must leave the second stage some of the {call.depth} layers"
            raise FieldError(self, "stage", self.stage, rule, call.depth // 2)
        patches = patch_tokens(self, call)
        seen = self.seen(stream[:, patches], call)
        call.state.forward["seen"] = seen.new_ones(stream.shape[:2]).index_copy(1, patches, seen)
        return self.begun(stream, call)

    def begun(self, stream: Tensor, call: Call) -> Tensor:
        """What the second stage begins with."""
        image: Tensor = call.state.forward["image"]
        return image

    def seen(self, x: Tensor, call: Call) -> Tensor:
        """Which patches `[b n e]` are of a part, 1 or 0 `[b n]`, with the gradient of how surely they are."""
        p = {name: w.to(x) for name, w in call.params.items()}
        x = layer_norm(x, p["norm"].shape, p["norm"], p["norm_bias"])
        near = 2 * x @ p["parts"].mT - p["parts"].square().sum(-1)  # but for x's square, the same for all
        call.state.forward["maps"] = near.softmax(-1)
        random = torch.Generator().manual_seed(call.forward if call.training else 0)
        drawn_by = torch.empty(len(x) if call.training else 1, *near.shape[1:]).exponential_(generator=random)
        near = near - drawn_by.to(near).log()  # Gumbel's noise
        found, ground = near.softmax(-1).split([self.parts, 1], -1)
        if call.training:
            found = found * (torch.rand(len(x), 1, self.parts, generator=random) >= self.drop).to(found)
        sure = found.sum(-1)
        return (found.amax(-1) >= ground[..., 0]).to(x) + (sure - sure.detach())

    @penalises(Site.RESIDUAL, when="shape")
    def form(self, stream: Tensor, call: Call) -> Tensor | None:
        maps = call.state.forward.pop("maps", None)  # [b n parts+1]
        if maps is None or not call.training or min(sides(call)) < REACH:
            return None
        return self.shape * shaping(maps.mT.unflatten(-1, sides(call)))

    @at(Site.VALUE)
    def teach(self, value: Tensor, call: Call) -> Tensor:
        seen = self._of_stage_one(call)
        return value if seen is None else value * seen.to(value)[:, None, :, None]

    @at(Site.MASK)
    def hide(self, mask: Mask, call: Call) -> Mask:
        if mask.causal:
            call.state.forward.pop("image", None)
        seen = self._of_stage_one(call)
        if seen is None:
            return mask
        keep = (seen.detach() > 0)[:, None, None].expand(-1, -1, len(call.queries), -1)
        return mask & Chosen(lambda rows: keep[:, :, rows])

    def _of_stage_one(self, call: Call) -> Tensor | None:
        found: Tensor | None = call.state.forward.get("seen") if call.layer >= self.stage else None
        return found


def _all_here(call: Call) -> bool:
    """Whether every patch of the grid is among the tokens, which is asked before the mask is known."""
    return int((call.coordinates("patches")[0][0, 0, :, 0] >= 0).sum()) == math.prod(sides(call))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    for parts in (1, 2, 4):
        with attach(model, IFAM(1, parts)) as run:
            print(parts, run.difference(**inputs))
