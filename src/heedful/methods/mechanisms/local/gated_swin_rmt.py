"""sigmoid(G x) * (A_down A_across v + K * v): rows, then columns of a window, each decayed by distance, and a gate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from heedful.authoring import (
    Call,
    FieldError,
    Layer,
    Method,
    NonNegativeFloat,
    OddInt,
    Paper,
    PositiveFloat,
    PositiveInt,
    Site,
    SiteError,
    at,
)
from heedful.kit.feature_maps import with_bias
from heedful.kit.patches import patch_tokens, sides, whole_image
from heedful.kit.running import wide


class GatedSwinRMT(Method):
    """Patches see those of their row, and then of their column, within a window. For image models trained with it.

    Let every other layer have windows that begin half a window in: `GatedSwinRMT(7).on(layers=[0, 2]) |
    GatedSwinRMT(7, 3).on(layers=[1, 3])`.
    """

    paper = Paper(
        "P046",
        "Gated-SwinRMT: Unifying Swin Windowed Attention with Retentive Manhattan Decay via Input-Dependent Gating",
        "Dipan Maity, Suman Mondal, Arindam Roy",
        2026,
        "2604.06014",
        differs=(
            "The variant with softmax (Retention); the one with sigmoids is not here, nor is the authors' pyramid.",
            "The paper's abstract was at hand; the decay of each head, and its logarithm added to scores, are those of "
            "RMT's code, whose convolution of values is five wide too. Queries and keys come as the model makes them.",
            "A window is as wide as it is told; the authors' grows to the whole map where that is small. Windows at "
            "the border of an image are smaller, and none wraps around it. In causal models, and where the patches "
            "are no grid or not all are read at once, softmax stays.",
            "Tokens outside the grid of patches, as a class token, get nothing and are seen by none; the authors' "
            "models have none. Let the last layer attend, .on(layers=...), where a model reads a class token.",
            "Convolution and gate are drawn as torch.nn draws them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    window: PositiveInt = 7  # patches along a side; Swin: 7
    shift: int = 0  # patches before the first whole window; Swin: half a window, in every other layer
    start: PositiveFloat = 2.0  # a head's decay is 1 - 2^-(start + span * its share of the heads before it); RMT: 2
    span: NonNegativeFloat = 4.0  # RMT: 4 and 6
    kernel: OddInt = 5  # patches along a side of the convolution of values; RMT: 5

    def __post_init__(self) -> None:
        if not 0 <= self.shift < self.window:
            raise FieldError(self, "shift", self.shift, "must be 0 or more, and less than the window", self.window // 2)

    @classmethod
    def example(cls) -> GatedSwinRMT:
        return cls(3, 1, kernel=3)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e = torch.Generator().manual_seed(layer.number), layer.heads * layer.value_dim
        return with_bias(random, "near", e, 1, self.kernel, self.kernel) | with_bias(random, "gate", e, layer.width)

    def idle(self, call: Call) -> bool:
        return not whole_image(call)

    @at(Site.MIX)
    def retain(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        if call.hidden is None:
            raise SiteError(f"{self!r}, layer {call.layer}: the layer's input is not known, and the gate needs it")
        q, k, v, hidden = wide(*qkv, call.hidden)
        p, patches = {name: x.to(q) for name, x in call.params.items()}, patch_tokens(self, call)
        given = (q, call.spread(k), call.spread(v))
        queries, keys, values = (x[:, :, patches].unflatten(2, sides(call)) for x in given)  # [b h rows cols d]
        found = self._along(queries, keys, values, call)
        queries, keys, found = (x.transpose(2, 3) for x in (queries, keys, found))
        found = self._along(queries, keys, found, call).transpose(2, 3)
        image = values.permute(0, 1, 4, 2, 3).flatten(1, 2)  # [b h*d rows cols]
        near = conv2d(image, p["near"], p["near_bias"], padding=self.kernel // 2, groups=image.shape[1])
        found = found.flatten(2, 3) + near.unflatten(1, (call.heads, -1)).flatten(3).mT
        gate = (hidden[:, patches] @ p["gate"].mT + p["gate_bias"]).sigmoid()
        found = found * gate.unflatten(-1, (call.heads, -1)).transpose(1, 2)
        return found.new_zeros(*q.shape[:3], found.shape[-1]).index_copy(2, patches, found)

    def _along(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """What the tokens of each line `[b h lines n d]` find of those of their window on it."""
        place = torch.arange(q.shape[3], device=q.device)
        apart, window = (place[:, None] - place).abs(), (place + self.window - self.shift) // self.window
        head = torch.arange(call.heads, dtype=q.dtype, device=q.device)[:, None, None, None] / call.heads
        decay = torch.log1p(-(2 ** -(self.start + self.span * head))) * apart
        scores = (q @ k.mT * call.scale + decay).masked_fill(window[:, None] != window, -torch.inf)
        return scores.softmax(-1) @ v


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    for window in (2, 4, 8):
        with attach(model, GatedSwinRMT(window)) as run:
            print(window, run.difference(**inputs))
