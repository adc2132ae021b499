"""silu(direct(m) + p out(r attend(m, v))), m a damped average of x: only tokens whose gate p is above 1/2 attend."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.methods.mechanisms.recurrent._averages import averaged, goes_on, looks, parameters_of


class SeqBoat(Method):
    """Moving averages serve all tokens, and a gate decides which of them attend, to others that do. To be trained."""

    paper = Paper(
        "P291",
        "Sparse Modular Activation for Efficient Sequence Modeling",
        "Liliang Ren, Yang Liu, Shuohang Wang, Yichong Xu, Chenguang Zhu, ChengXiang Zhai",
        2023,
        "2306.11197",
        "NeurIPS 2023",
        differs=(
            "For causal models, with softmax, which is one of the authors' two ways to weigh, and a learned bias of "
            "distances, in whose place their language models rotate queries and keys.",
            "What the block gives is added to the stream behind its activation; the authors' activation has the stream "
            "in it. The model's own projections stay in the block, unused.",
            "Tokens that do not attend are computed and left out, not gathered: what is saved is told by how many "
            "attend, and not by time.",
            "The router's temperature begins at the root of the width, as in the authors' language models; weights are "
            "normal, and not cut off at two deviations. Nothing is dropped in training.",
        ),
    )
    # channels that queries and keys are made of; the authors: 64 on long ranges, 128 for language
    shared: PositiveInt = 64
    averages: PositiveInt = 16  # of each channel; the authors: 16
    # tokens that attend, back from each, that it sees besides itself; the authors: 128 to 1024
    window: PositiveInt = 256
    reach: PositiveInt = 1024  # distances with a bias of their own; the authors: 1024

    @classmethod
    def example(cls) -> SeqBoat:
        return cls(8, 3, 4, 5)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        e, z = layer.width, self.shared

        def drawn(*shape: int) -> Tensor:
            return 0.02 * torch.randn(shape, generator=random)

        return {
            "direct": drawn(2 + e, e), "direct_bias": torch.zeros(2 + e),
            "base": drawn(z + 4 * e, e), "base_bias": torch.zeros(z + 4 * e),
            "out": drawn(e, 2 * e), "out_bias": torch.zeros(e),
            "turn": drawn(2, z), "turn_bias": torch.zeros(2, z), "distance": drawn(self.reach),
            "temperature": torch.tensor([math.log(e) / 2]),
            **parameters_of(e, self.averages, random),
        }  # fmt: skip

    @at(Site.BLOCK)
    def attend(self, hidden: Tensor, call: Call) -> Tensor:
        if not call.mask.causal:
            rule = "SeqBoat's averages need a causal call; restrict it with .on(layers=...)"
            raise SiteError(f"layer {call.layer}: {rule}")
        p, e = call.params, hidden.shape[-1]
        x = hidden.to(p["base"].dtype)
        text = call.is_text[:, 0].expand(x.shape[:2])
        goes_on(call, len(x), x.shape[1])
        near = silu(averaged(x * text[..., None], call) + x * p["skip"])
        routes, direct = linear(near, p["direct"], p["direct_bias"]).split([2, e], -1)
        gate = self.gate(routes / p["temperature"].exp()) * text  # [b n]
        seen, reset, value = silu(linear(near, p["base"], p["base_bias"])).split([self.shared, 2 * e, 2 * e], -1)
        query, key = ((seen * w + b) for w, b in zip(p["turn"], p["turn_bias"], strict=True))
        mixed = looks(query, key, value, gate > 0, call, self.window)
        return silu(direct + linear(mixed * reset, p["out"], p["out_bias"]) * gate[..., None])

    def gate(self, routes: Tensor) -> Tensor:
        """How much of attention each token gets `[b n]`, given what speaks against it and for it, `[b n 2]`."""
        chance = routes.softmax(-1)[..., 1]
        return torch.where(chance > 0.5, chance, 0.0)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, SeqBoat()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
