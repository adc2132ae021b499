"""x g(mean of its row) g(mean of its column), g(z) = sigmoid(norm(K * z)): gates that convolve along the two axes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv1d, group_norm

from heedful.authoring import Call, FieldError, Layer, Method, OddInt, Paper, PositiveInt, Site, at
from heedful.kit.feature_maps import drawn, feature_map, laid_back


class ELA(Method):
    """Gates what attention hands over by the row and the column that a patch is in. For models trained with it."""

    paper = Paper(
        "P104",
        "ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
        "Wei Xu, Yi Wan",
        2024,
        "2403.01123",
        differs=(
            "Neither the authors' text nor their code was at hand: the formula was read against others' code for it.",
            "Behind the attention of a vision transformer, as behind a convolution in the authors' residual blocks.",
            "One convolution and one norm serve both axes, as in that code.",
            "Tokens outside the grid of patches, as a class token, are left as they are; the authors' models have "
            "none. Layers that are causal, or whose patches lie on no grid, are refused.",
            "The convolution is drawn as torch.nn.Conv1d draws it, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    every_token = True
    kernel: OddInt = 7  # patches that it reaches along an axis; the paper: 5 or 7
    groups: PositiveInt = 16  # of channels that are normed together; the paper: 16 or 32
    together: PositiveInt = 1  # channels that are convolved together; the paper: 1 or 8

    @classmethod
    def example(cls) -> ELA:
        return cls(3, 4)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        e = layer.width
        for name in ("groups", "together"):
            if e % (given := getattr(self, name)):
                raise FieldError(self, name, given, f"must divide the {e} channels of the model", math.gcd(e, given))
        random = torch.Generator().manual_seed(layer.number)
        return {"kernel": drawn(random, e, self.together, self.kernel), "norm": torch.ones(e), "bias": torch.zeros(e)}

    @at(Site.OUTPUT)
    def gate(self, output: Tensor, call: Call) -> Tensor:
        p = {name: x.to(output) for name, x in call.params.items()}
        image = feature_map(self, call, output)

        def along(mean: Tensor) -> Tensor:  # [b e places]
            parts = mean.shape[1] // self.together
            found = conv1d(mean, p["kernel"], padding=self.kernel // 2, groups=parts)
            return group_norm(found, self.groups, p["norm"], p["bias"]).sigmoid()

        rows, columns = along(image.mean(3))[..., None], along(image.mean(2))[:, :, None]
        return laid_back(self, call, image * rows * columns, output)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, ELA(3, 4)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
