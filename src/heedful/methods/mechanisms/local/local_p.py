"""Softmax over |j - p| <= D, times exp(-2 (j - p)^2 / D^2): p = S sigmoid(v tanh(W x)) is told by the query's token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from heedful.authoring import Call, Layer, Mask, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.core.positions import spread_heads
from heedful.kit.chosen import Chosen
from heedful.kit.feature_maps import drawn


class LocalP(Method):
    """A token predicts where in the source to look, and sees what is near. For encoder-decoders trained with it."""

    paper = Paper(
        "P083",
        "Effective Approaches to Attention-based Neural Machine Translation",
        "Minh-Thang Luong, Hieu Pham, Christopher D. Manning",
        2015,
        "1508.04025",
        "EMNLP 2015",
        differs=(
            "The authors' text was not at hand: the formula was read against another's account of it.",
            "This is the paper's local attention with predicted places; its scores are the model's own products, which "
            "is the paper's `general` with projections on both sides. Input feeding and local-m are not part of it.",
            "Each head predicts a place of its own; the authors' models have one head.",
            "x is what the attention block is handed, in the place of the state of a recurrent net.",
            "Weights are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("cross",)
    window: PositiveInt = 10  # D, places of the source to either side; the paper: 10

    @classmethod
    def example(cls) -> LocalP:
        return cls(3)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        h, d, e = layer.heads, layer.head_dim, layer.width
        return {"turn": drawn(random, h * d, e), "place": drawn(random, h, d)}

    def idle(self, call: Call) -> bool:
        return not call.cross

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        centres, places = self.centres(call).detach()[..., None], spread_heads(call.k_pos, call.heads)[:, :, None]
        return mask & Chosen(lambda rows: (places - centres[:, :, rows]).abs() <= self.window)

    @at(Site.PATTERN)
    def favour(self, weights: Tensor, call: Call) -> Tensor:
        centres = pad(self.centres(call), (call.earlier, 0))[:, :, call.rows, None]
        far = (spread_heads(call.k_pos, call.heads)[:, :, None] - centres) / (self.window / 2)
        return weights * (-far.square() / 2).exp().to(weights.dtype)

    def centres(self, call: Call) -> Tensor:
        """The place in the source that each head and token of the call looks at, `[b h q]`."""
        if call.hidden is None or call.key is None:
            raise SiteError(f"LocalP, layer {call.layer}: the block is not handed hidden states to predict places by")
        turn, place = call.params["turn"], call.params["place"]
        x = linear(call.hidden.flatten(1, -2).to(turn.dtype), turn).tanh().unflatten(-1, place.shape)
        share = (x * place).sum(-1).sigmoid().mT
        total, padding = call.key.shape[2], call.mask.padding
        if padding is None:
            return share * total
        return share * padding.at(torch.arange(total, device=share.device)[None, None]).sum(-1, keepdim=True)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.arange(3, 19)[None]
    with attach(model, LocalP(3), only=("model.decoder.layers.0.encoder_attn",)) as run:
        print(run(input_ids=ids, decoder_input_ids=ids[:, :5]).logits.std(), run.activity())
