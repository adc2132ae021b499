"""y' = sigmoid(U swish(D y)) y: the normed input y of attention under a gate of low rank that looks at y itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, at
from heedful.kit.feature_maps import drawn


class GatedNorm(Method):
    """A gate behind the norm, so that none need be huge for the others to be small. For models trained with it."""

    paper = Paper(
        "P314",
        "A Unified View of Attention and Residual Sinks: Outlier-Driven Rescaling is Essential for Transformer "
        "Training",
        "Zihan Qiu, Zeyu Huang, Kaiyue Wen, Peng Jin, Bo Zheng, Yuxin Zhou, Haofeng Huang, Zekun Wang, Xiao Li, "
        "Huaqing Zhang, Yang Xu, Haoran Lian, Siqi Zhang, Rui Men, Jianwei Zhang, Ivan Titov, Dayiheng Liu, "
        "Jingren Zhou, Junyang Lin",
        2026,
        "2601.22966",
        differs=(
            "The authors' full text was not at hand: the gate was read against its abstract and summaries.",
            "The gate stands at the attention's input, behind the norm of models that norm there; the paper has one "
            "behind every norm, those before the feed-forward part and at the end too, where there is no site.",
            "The feed-forward part stays as wide as it is; the paper narrows it until as many parameters are there.",
            "None of these says how the gate starts; its maps are drawn as torch.nn.Linear draws them, by a "
            "generator seeded by the layer's number, so that it starts near one half.",
        ),
    )
    rank: PositiveInt = 16  # numbers between the gate's two maps; the paper's default

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        return {"down": drawn(random, self.rank, layer.width), "up": drawn(random, layer.width, self.rank)}

    @at(Site.HIDDEN)
    def gate(self, hidden: Tensor, call: Call) -> Tensor:
        down, up = call.params["down"], call.params["up"]
        return hidden * torch.sigmoid(linear(silu(linear(hidden.to(down.dtype), down)), up)).to(hidden.dtype)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, GatedNorm()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
