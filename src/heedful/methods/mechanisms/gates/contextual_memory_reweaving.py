"""x_l + sum_{m < l} w_lm x_m: an attention block is handed what the blocks before it were handed, too."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, Site, at


class ContextualMemoryReweaving(Method):
    """States of a token at earlier layers are woven into what a layer attends with, by learned weights."""

    paper = Paper(
        "P000",
        "Contextual Memory Reweaving in Large Language Models Using Layered Latent State Reconstruction",
        "Frederick Dillon, Gregor Halvorsen, Simon Tattershall, Magnus Rowntree, Gareth Vanderpool",
        2025,
        "2502.02046",
        differs=(
            "Written from the abstract, which says that latent states of different layers are integrated again and "
            "gives no formula: here a layer adds those of the layers before it, each by one learned weight.",
            "The states are what attention blocks are handed, which the model's norms have seen. The feed-forward "
            "parts, and the stream, are left as they are.",
        ),
    )
    start: Annotated[float, Interval(ge=-1, le=1)] = 0.0  # the weights at the start

    @classmethod
    def example(cls) -> ContextualMemoryReweaving:
        return cls(0.5)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"weight": torch.full((layer.number,), self.start)} if layer.number else {}

    @at(Site.HIDDEN)
    def weave(self, hidden: Tensor, call: Call) -> Tensor:
        states = call.state.forward
        before = [m for m in range(call.lowest, call.layer) if str(m) in states]
        states[str(call.layer)] = hidden
        if not before:
            return hidden
        weight = call.params["weight"].to(hidden.dtype)
        return hidden + torch.stack([weight[m] * states[str(m)] for m in before]).sum(0)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, ContextualMemoryReweaving(0.1)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: p.tolist() for name, p in run.state_dict().items()}, run.activity())
