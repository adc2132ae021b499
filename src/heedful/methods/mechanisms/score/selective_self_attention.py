"""Queries times tanh(w x) + 1 + exp(-exp(b)) log n at place n, values v times 1 + tanh(u v); w, u and b are learned."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, NonNegativeFloat, Paper, Site, SiteError, at


class SelectiveSelfAttention(Method):
    """SSA: a learned temperature for each token's query, by what it is and where, and a scale for each value."""

    paper = Paper(
        "P157",
        "Selective Attention: Enhancing Transformer through Principled Context Control",
        "Xuechen Zhang, Xiangyu Chang, Mingchen Li, Amit Roy-Chowdhury, Jiasi Chen, Samet Oymak",
        2024,
        "2411.12892",
        "NeurIPS 2024",
        differs=(
            "The authors' code has what depends on the place alone, and is followed in that; the paper has a sigmoid "
            "in place of the two exponentials. That a token adds a tanh of a trainable function is read from two "
            "reimplementations.",
            "The function is linear, of the layer's input for queries and of the value itself for values, which is "
            "what a cache keeps; each head has its own. What the authors' is made of could not be had.",
            "Values have no part by place but its 1; what the authors' have of it could not be read, and nothing of "
            "values is in their code.",
        ),
    )
    start: float = 1.5  # b at the start; the authors' code: 1.5 to train from scratch, 2 to go on with a trained model
    # standard deviation of w and u at the start; 0 nearly leaves a trained model as it was
    spread: NonNegativeFloat = 0.0

    @classmethod
    def neutral(cls) -> SelectiveSelfAttention:
        return cls(start=10.0)  # exp(-exp(10)) is zero

    @classmethod
    def example(cls) -> SelectiveSelfAttention:
        return cls(start=0.0, spread=0.5)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        return {
            "query": self.spread * torch.randn(layer.heads, layer.width, generator=random),
            "value": self.spread * torch.randn(layer.kv_heads, layer.value_dim, generator=random),
            "place": torch.tensor([float(self.start)]),
        }

    @at(Site.QUERY)
    def heat(self, query: Tensor, call: Call) -> Tensor:
        b, _, n, _ = query.shape
        if call.hidden is None or call.hidden.shape[:-1].numel() != b * n:
            raise SiteError(
                f"{self!r}, layer {call.layer}: the layer's input [b n e] is not known, and the temperature needs it"
            )
        weight = call.params["query"]
        token = torch.tanh(call.hidden.reshape(b, n, -1).to(weight.dtype) @ weight.mT).mT  # [b h n]
        place = 1 + torch.exp(-torch.exp(call.params["place"])) * (call.q_pos + 1).clamp(min=1).log()
        return query * (token + place)[..., None].to(query.dtype)

    @at(Site.VALUE)
    def scale(self, value: Tensor, call: Call) -> Tensor:
        weight = call.params["value"]
        return value * (1 + torch.tanh((value.to(weight.dtype) * weight[:, None]).sum(-1, keepdim=True))).to(
            value.dtype
        )


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, SelectiveSelfAttention()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
