"""Each row of scores is standardised over the keys it sees: weights g (s - mean) / deviation + c, some below zero."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat
from heedful.core.sites import Site, at
from heedful.kit.seen import how_many, only_seen


class NormalizedAttention(Method):
    """NAP: weights need not be a distribution, so heads may subtract values. For models trained with it."""

    paper = Paper(
        "P211",
        "Normalized Attention Without Probability Cage",
        "Oliver Richter, Roger Wattenhofer",
        2020,
        "2005.09561",
        differs=(
            "Only the weights are replaced: the norms and the activation that the authors put behind the heads are the "
            "model's business.",
            "What keeps the deviation above zero is 1e-5 in the variance of the scaled scores, which has a gradient "
            "where all are equal; the authors add 0.001 to the deviation of unscaled scores, and for graphs 1e-16 to "
            "the sum of their squared distances from the mean.",
            "Their keys are all tokens; under a causal mask a row is standardised over the keys that it sees, and one "
            "that sees a single key gives it the shift alone.",
        ),
    )
    # added to the variance of a row's scores
    eps: PositiveFloat = 1e-5

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"gain": torch.ones(layer.heads), "shift": torch.zeros(layer.heads)}

    @at(Site.NORMALISE)
    def standardise(self, scores: Tensor, call: Call) -> Tensor:
        seen = how_many(call, scores)
        mean = only_seen(scores, call).sum(-1, keepdim=True) / seen
        off = only_seen(scores - mean, call, into=True)
        variance = torch.linalg.vector_norm(off, dim=-1, keepdim=True).square() / seen
        gain, shift = (call.params[name][:, None, None].to(off.dtype) for name in ("gain", "shift"))
        return torch.addcmul(shift, gain * torch.rsqrt(variance + self.eps), off)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, NormalizedAttention()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
