"""o = W_3 (norm(gelu(W_1 x)) * norm(W_2 x)): a normed and gated feed-forward part in place of attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from heedful.authoring import Call, Layer, Method, Paper, PositiveFloat, Site, at
from heedful.kit.feature_maps import with_bias


class Activator(Method):
    """A gate of channels in place of attention: no token sees another. For image models trained with it."""

    paper = Paper(
        "P290",
        "Activator: GLU Activations as The Core Functions of a Vision Transformer",
        "Abdullah Nazhat Abdullah, Tarkan Aydin",
        2024,
        "2405.15953",
        differs=(
            "The block's gate alone, as in the authors' code; that the feed-forward part behind it may go is the "
            "model's affair, and it stays.",
            "Tokens meet in what the model makes of them in the end, a mean in the authors' models. A class token, "
            "where a model reads one, learns nothing from the others: let the last layer attend, .on(layers=...).",
            "Weights are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image", "text")
    inner: PositiveFloat = 2.0  # width between the maps, times that of tokens; the authors: 512 for 256

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e = torch.Generator().manual_seed(layer.number), layer.width
        inner = max(1, round(self.inner * e))
        found = with_bias(random, "gate", inner, e) | with_bias(random, "up", inner, e)
        found |= with_bias(random, "down", e, inner)
        return found | {"norm": torch.ones(inner), "norm_bias": torch.zeros(inner)}

    @at(Site.BLOCK)
    def gate(self, hidden: Tensor, call: Call) -> Tensor:
        p = call.params
        x = hidden.to(p["gate"].dtype)

        def normed(y: Tensor) -> Tensor:  # one norm serves both, as in the authors' code
            return layer_norm(y, y.shape[-1:], p["norm"], p["norm_bias"])

        opened = normed(gelu(linear(x, p["gate"], p["gate_bias"])))
        return linear(opened * normed(linear(x, p["up"], p["up_bias"])), p["down"], p["down_bias"])


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, Activator()) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
