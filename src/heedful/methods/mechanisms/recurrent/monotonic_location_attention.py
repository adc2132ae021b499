"""Weights exp(-(j - m_i)^2 / 2 d_i^2) over their sum; m_i lies max(0, u q_i) places after where token i - 1 looked."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, Site, at
from heedful.core.positions import spread_heads
from heedful.kit.running import wide
from heedful.methods.mechanisms.recurrent._walk import looked_last, remember, seen

STEPS = {"any": torch.relu, "one": lambda x: torch.sigmoid(5 * x)}
LEAST = 0.27  # of a place, the standard deviation that weights have at least: two neighbours weigh 0.1 % of the middle


class MonotonicLocationAttention(Method):
    """A head goes through the source from left to right, and looks at places alone. For encoder-decoders trained so."""

    paper = Paper(
        "P156",
        "Monotonic Location Attention for Length Generalization",
        "Jishnu Ray Chowdhury, Cornelia Caragea",
        2023,
        "2305.20019",
        "ICML 2023",
        differs=(
            "This is the paper's MonoAttn, and with steps of `one` its OneStepAttn: places alone, without a share "
            "of attention by content, and for sources that are read forward, without reversed encodings beside.",
            "What tells step and width are the layer's own queries; the authors project the decoder's state once more.",
            "Weights over their sum are a softmax of the exponents, which cannot underflow where a head has gone past "
            "the end of the source; the authors add 1e-20 to the sum.",
            "The authors mix relu with a sigmoid by a learned share that begins at two billionths; here it is relu.",
            "Weights are drawn by a generator seeded by the layer's number, from the authors' distribution.",
        ),
    )
    subjects = ("cross",)
    steps: Literal["any", "one"] = "any"  # how far a token may go on: "any" number of places, or at most "one"

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, shape = torch.Generator().manual_seed(layer.number), (layer.heads, layer.head_dim)
        bound = math.sqrt(6 / sum(shape))
        return {name: (torch.rand(shape, generator=random) * 2 - 1) * bound for name in ("step", "width")}

    def idle(self, call: Call) -> bool:
        return not call.cross

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        weights = self.weights(q, k.shape[2], call)
        return (weights @ call.spread(v)).to(qkv[2].dtype)

    def weights(self, q: Tensor, total: int, call: Call) -> Tensor:
        """The pattern `[b h q k]`, row after row, since each goes on from where the last one looked."""
        b, h, n, _ = q.shape
        step, width = (
            (q * call.params[name].to(q.dtype)[:, None]).sum(-1, keepdim=True) for name in ("step", "width")
        )  # [b h q 1]
        keep = seen(call, (b, h, n), total, q.device)
        length = keep.sum(-1, keepdim=True).clamp(min=1)
        spread = (torch.relu(width) + LEAST) * (length - 1).clamp(min=1) / length
        step = STEPS[self.steps](step)
        places = spread_heads(call.k_pos, h).to(q.dtype)  # [b|1 h|1 k]
        moves = keep.any(-1, keepdim=True) & call.is_text[..., None]
        place, rows = looked_last(self, call, q.new_zeros(b, h, 1)), []
        for i in range(n):
            far = (places - place - step[:, :, i]) / spread[:, :, i]
            row = (-far.square() / 2).masked_fill(~keep[:, :, i], torch.finfo(q.dtype).min).softmax(-1)
            place = torch.where(moves[:, :, i], (row * places).sum(-1, keepdim=True), place)
            rows.append(row.masked_fill(~keep[:, :, i], 0.0))
        remember(call, place)
        return torch.stack(rows, 2)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.arange(3, 19)[None]
    with attach(model, MonotonicLocationAttention(), only=("model.decoder.layers.0.encoder_attn",)) as run:
        print(run(input_ids=ids, decoder_input_ids=ids[:, :5]).logits.std(), run.activity())
