"""Out = u (silu(W_x m + W_h (r attend(m, v))) - x): m a damped moving average of x, of which a single head looks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.methods.mechanisms.recurrent._averages import averaged, goes_on, looks, parameters_of


class Mega(Method):
    """Moving averages tell what is near, one gated head what is far. For models trained with it."""

    paper = Paper(
        "P087",
        "Mega: Moving Average Equipped Gated Attention",
        "Xuezhe Ma, Chunting Zhou, Xiang Kong, Junxian He, Liangke Gui, Graham Neubig, Jonathan May, Luke Zettlemoyer",
        2023,
        "2209.10655",
        "ICLR 2023",
        differs=(
            "For causal models: averages run one way, and softmax weighs, not Laplace's function; texts are not cut "
            "into chunks that see themselves alone.",
            "The update gate weighs the difference to what the block is handed, which the model's norm has seen, where "
            "the authors' has the stream itself. The model's own projections stay in it, unused.",
            "Distances have a learned bias, the last of which all further ones share; the authors' is for no more "
            "tokens than it has entries, and their language models have one made of rotations instead.",
            "Weights are drawn by a generator seeded by the layer's number; nothing is dropped in training.",
        ),
    )
    shared: PositiveInt = 64  # z, channels that queries and keys are made of; the paper's language models: 128 to 256
    averages: PositiveInt = 16  # of each channel; the authors' code: 16 for language
    reach: PositiveInt = 128  # distances with a bias of their own

    @classmethod
    def example(cls) -> Mega:
        return cls(8, 3, 5)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        e, z, n = layer.width, self.shared, self.averages

        def drawn(*shape: int, spread: float = 0.02) -> Tensor:
            return spread * torch.randn(shape, generator=random)

        return {
            "value": drawn(2 * e, e), "value_bias": torch.zeros(2 * e),
            "base": drawn(z + 4 * e, e), "base_bias": torch.zeros(z + 4 * e),
            "out": drawn(e, 2 * e), "out_bias": torch.zeros(e),
            "turn": drawn(2, z), "turn_bias": torch.zeros(2, z), "distance": drawn(self.reach),
            **parameters_of(e, n, random),
        }  # fmt: skip

    @at(Site.BLOCK)
    def attend(self, hidden: Tensor, call: Call) -> Tensor:
        if not call.mask.causal:
            raise SiteError(f"layer {call.layer}: Mega's averages need a causal call; restrict it with .on(layers=...)")
        p, e = call.params, hidden.shape[-1]
        x = hidden.to(p["base"].dtype)
        text = call.is_text[:, 0].expand(x.shape[:2])
        goes_on(call, len(x), x.shape[1])
        value = silu(linear(x, p["value"], p["value_bias"]))
        near = silu(averaged(x * text[..., None], call) + x * p["skip"])
        update, inner, direct = linear(near, p["base"], p["base_bias"]).split([e, self.shared + 2 * e, e], -1)
        seen, reset = silu(inner).split([self.shared, 2 * e], -1)
        query, key = ((seen * w + b) for w, b in zip(p["turn"], p["turn_bias"], strict=True))
        mixed = looks(query, key, value, text, call)
        new = silu(direct + linear(mixed * reset, p["out"], p["out_bias"]))
        return update.sigmoid() * (new - x)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, Mega()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
