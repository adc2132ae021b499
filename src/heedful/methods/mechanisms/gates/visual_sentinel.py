"""softmax([z; z_s]): one slot more than keys, for s = sigmoid(W x) tanh(U x), what the token that asks knows itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.kit.feature_maps import drawn
from heedful.kit.running import wide
from heedful.kit.tile_scores import additive


class VisualSentinel(Method):
    """Each head chooses whether to look at the other sequence, or at nothing of it. For encoder-decoders trained so."""

    paper = Paper(
        "P183",
        "Knowing When to Look: Adaptive Attention via A Visual Sentinel for Image Captioning",
        "Jiasen Lu, Caiming Xiong, Devi Parikh, Richard Socher",
        2017,
        "1612.01887",
        "CVPR 2017",
        differs=(
            "The sentinel is made of the attention block's input alone, head by head; the authors make it of their "
            "recurrent net's input, last state and memory cell, and it serves the one head that they have.",
            "This is the paper's equation; in the authors' code the sentinel first goes through a linear map and a "
            "relu, and what looks is a linear map and a tanh of the state.",
            "Energies are z = w . tanh(W_v k + W_g q) and w . tanh(W_s s + W_g q) as in the paper, of the model's own "
            "queries and keys, one net for a layer's heads; regions are mixed as the model's values.",
            "Weights are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("cross",)
    units: PositiveInt = 64  # of the net that tells energies; the authors: as many as a region has numbers, 512

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, n, inside = torch.Generator().manual_seed(layer.number), self.units, layer.heads * layer.value_dim
        return {
            "gate": drawn(random, inside, layer.width), "memory": drawn(random, inside, layer.width),
            "of_query": drawn(random, n, layer.head_dim), "of_key": drawn(random, n, layer.head_dim),
            "of_sentinel": drawn(random, n, layer.value_dim), "out": drawn(random, 1, n),
        }  # fmt: skip

    def idle(self, call: Call) -> bool:
        return not call.cross

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        sentinel = self.sentinel(call).to(v.dtype)
        weights = self.weights(q, k, sentinel, call).to(v.dtype)
        found = weights[..., :-1] @ call.spread(v) + weights[..., -1:] * sentinel
        return found.to(qkv[2].dtype)

    def sentinel(self, call: Call) -> Tensor:
        """What each token knows itself, `[b h q d]`."""
        if call.hidden is None:
            raise SiteError(f"{self!r}, layer {call.layer}: the block is not handed hidden states to make sentinels of")
        p = call.params
        x = call.hidden.flatten(1, -2).to(p["gate"].dtype)
        found = linear(x, p["gate"]).sigmoid() * linear(x, p["memory"]).tanh()
        return found.unflatten(-1, (call.heads, -1)).transpose(1, 2)

    def weights(self, q: Tensor, k: Tensor, sentinel: Tensor, call: Call) -> Tensor:
        """The pattern over keys, and in the last column what the sentinel gets, `[b h q k+1]`."""
        p = call.params
        energies = additive(q, call.spread(k), p["of_query"], p["of_key"], p["out"])
        own = (
            linear(q.to(p["out"].dtype), p["of_query"]) + linear(sentinel.to(p["out"].dtype), p["of_sentinel"])
        ).tanh() @ p["out"].mT
        keep = call.mask.keeps(call.pairs)
        if keep is not None:
            energies = energies.masked_fill(~keep, torch.finfo(energies.dtype).min)
        return torch.cat([energies, own], -1).softmax(-1)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.arange(3, 19)[None]
    with attach(model, VisualSentinel(), only=("model.decoder.layers.0.encoder_attn",)) as run:
        print(run(input_ids=ids, decoder_input_ids=ids[:, :5]).logits.std(), run.activity())
