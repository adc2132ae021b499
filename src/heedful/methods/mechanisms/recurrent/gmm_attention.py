"""alpha_ij = sum_c w_c N(j; m_ic, s_c^2), m_i = m_i-1 + softplus(step): Gaussians that move on, and never back."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, at
from heedful.core.positions import spread_heads
from heedful.kit.feature_maps import drawn, with_bias
from heedful.kit.running import wide
from heedful.methods.mechanisms.recurrent._walk import looked_last, remember, seen

STEP, WIDTH = 1.0, 10.0  # of a place, where every Gaussian begins: how far a token goes on, and how wide it looks


class GMMAttention(Method):
    """A head goes through the source by a few Gaussians, by places alone. For encoder-decoders trained so."""

    paper = Paper(
        "P266",
        "Location-Relative Attention Mechanisms For Robust Long-Form Speech Synthesis",
        "Eric Battenberg, RJ Skerry-Ryan, Soroosh Mariooryad, Daisy Stanton, David Kao, Matt Shannon, Tom Bagby",
        2020,
        "1910.10288",
        "ICASSP 2020",
        differs=(
            "This is the paper's GMMv2b; its dynamic convolution attention, which filters the weights of the token "
            "before, is not here.",
            "What tells weights, steps and widths are a head's own queries; the authors' one head has the decoder's "
            "state, which also knows what was looked at last.",
            "Initial weights are those of torch.nn.Linear, drawn by a generator seeded by the layer's number; the "
            "formula was read in others' code, and begins with the paper's step of 1 and width of 10.",
        ),
    )
    subjects = ("cross",)
    components: PositiveInt = 5  # Gaussians a head; the paper: 5
    units: PositiveInt = 128  # of the net that moves them; the paper: 128

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, h, n = torch.Generator().manual_seed(layer.number), layer.heads, self.units
        found = with_bias(random, "in", h * n, layer.head_dim) | {"out": drawn(random, h * 3 * self.components, n)}
        found = {name: x.unflatten(0, (h, -1)) for name, x in found.items()}
        start = torch.tensor([0.0, math.log(math.expm1(STEP)), math.log(math.expm1(WIDTH))])
        return found | {"out_bias": start.repeat_interleave(self.components).repeat(h, 1)}

    def idle(self, call: Call) -> bool:
        return not call.cross

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        return (self.weights(q, k.shape[2], call).to(v.dtype) @ call.spread(v)).to(qkv[2].dtype)

    def weights(self, q: Tensor, total: int, call: Call) -> Tensor:
        """The pattern `[b h q k]`; a row adds up to less than one where Gaussians reach beyond the source."""
        b, h, n, _ = q.shape
        share, mean, width = self.gaussians(q, call)
        places = spread_heads(call.k_pos, h).to(q.dtype)[:, :, None, :, None]  # [b|1 h|1 1 k 1]
        far = (places - mean[:, :, :, None]) / width[:, :, :, None]
        height = share / (math.sqrt(2 * math.pi) * width)
        pattern = (height[:, :, :, None] * (-far.square() / 2).exp()).sum(-1)
        return pattern.masked_fill(~seen(call, (b, h, n), total, q.device), 0.0)

    def gaussians(self, q: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and deviations of each token's Gaussians, `[b h q c]` each."""
        p = {name: x.to(q.dtype) for name, x in call.params.items()}
        inner = (q @ p["in"].mT + p["in_bias"][:, None]).tanh()
        share, step, width = (inner @ p["out"].mT + p["out_bias"][:, None]).chunk(3, -1)
        moves = softplus(step) * call.is_text[..., None]
        start = looked_last(self, call, q.new_zeros(*q.shape[:2], self.components))
        mean = start[:, :, None] + moves.cumsum(2)
        remember(call, mean[:, :, -1])
        return share.softmax(-1), mean, softplus(width)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.arange(3, 19)[None]
    with attach(model, GMMAttention(), only=("model.decoder.layers.0.encoder_attn",)) as run:
        print(run(input_ids=ids, decoder_input_ids=ids[:, :5]).logits.std(), run.activity())
