"""softmax of s_ij + n_ij log sigmoid(w x_i + c) over keys with s_ij > 0, n_ij of them from j on; s of normed q, k."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, PositiveFloat, Site, SiteError, at
from heedful.core.flags import zeroed
from heedful.kit.rows import tiles
from heedful.kit.running import divided, grouped, wide


class ThresholdRelativeAttention(Method):
    """Keys that score zero or less are gone, and distance counts the keys that are left. For models trained with it.

    A query all of whose keys are below the threshold looks at nothing.
    """

    paper = Paper(
        "P212",
        "TRA: Better Length Generalisation with Threshold Relative Attention",
        "Mattia Opper, Roland Fernandez, Paul Smolensky, Jianfeng Gao",
        2025,
        "2503.23174",
        "TMLR",
        differs=(
            "Read from the authors' notebook (MOSS 2025, submission 96), whose query and key each have their root mean "
            "square divided out; there is no other notion of place, so that a model's rotary embedding is left out.",
            "What gives the decay is drawn as torch.nn.Linear draws it, by a generator seeded by the layer's number.",
            "There is no dropout of the scores.",
            "Scores are multiplied with the model's own factor, which in most is the paper's, one over the root of d.",
        ),
    )
    eps: PositiveFloat = 1e-6  # added to the mean square of queries and keys; the authors' code: 1e-6

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        bound = 1 / math.sqrt(layer.width)
        weight = (torch.rand(layer.heads, layer.width, generator=random) * 2 - 1) * bound
        return {"weight": weight, "bias": (torch.rand(layer.heads, generator=random) * 2 - 1) * bound}

    @at(Site.MIX, before_rotary=True)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        q, k, decay = self._normed(q) * call.scale, self._normed(k), self._decay(q, call)
        v, out = torch.cat([v, torch.ones_like(v[..., :1])], -1), []
        for part in tiles(call, len(q)):
            scores = grouped(q[:, :, part.rows], k[:, :, part.cols].mT)
            if part.keep is not None:
                scores = zeroed(scores, part.keep, into=True)
            there = scores.detach().sign().relu_()  # 1 or 0
            before = there.cumsum(-1)
            # 1 where none is left, so that a row's highest is one that is there
            places = (before[..., -1:] - before).add_(there).clamp_(min=1)
            weights = torch.addcmul(scores, decay[:, :, part.rows], places).softmax(-1) * there
            out.append(divided(grouped(weights, v[:, :, part.cols])))
        return torch.cat(out, 2).to(qkv[2].dtype)

    def _normed(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def _decay(self, q: Tensor, call: Call) -> Tensor:
        """The logarithm of what is left of a query's interest from one key to the next, `[b h q 1]`."""
        b, _, n, _ = q.shape
        if call.hidden is None or call.hidden.shape[:-1].numel() != b * n:
            raise SiteError(
                f"{self!r}, layer {call.layer}: the layer's input [b n e] is not known, and the decay needs it"
            )
        weight, bias = call.params["weight"], call.params["bias"]
        gate = torch.nn.functional.linear(call.hidden.reshape(b, n, -1).to(weight.dtype), weight, bias)
        return torch.nn.functional.logsigmoid(gate).mT[..., None]


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, ThresholdRelativeAttention()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
