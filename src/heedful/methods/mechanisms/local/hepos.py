"""Head h sees the places j of the source with (j - h) mod s = 0, so that s heads share it among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.authoring import Call, FieldError, Mask, Method, Paper, PositiveInt, Rule, Site, at
from heedful.core.positions import Pairs


@dataclass(frozen=True)
class Strided(Rule):
    """Each query head keeps every so many-th key, beginning with the one of its own number."""

    stride: int

    def keeps(self, pairs: Pairs) -> Tensor:
        head = torch.arange(pairs.heads, device=pairs.k.device)[:, None, None]
        return (pairs.k - head) % self.stride == 0

    @property
    def scattered(self) -> bool:
        return True


class Hepos(Method):
    """Heads of cross-attention share the source by strides; for encoder-decoders trained or tuned with it."""

    paper = Paper(
        "P123",
        "Efficient Attentions for Long Document Summarization",
        "Luyang Huang, Shuyang Cao, Nikolaus Parulian, Heng Ji, Lu Wang",
        2021,
        "2104.02112",
        "NAACL 2021",
        differs=(
            "Pairs are left out by a mask: what a head does not see costs no softmax, and its memory is not saved.",
            "Places are counted from where each source begins. A head for which a source is too short gives zeros.",
            "Nothing is put behind a source; the authors' code puts 1 to `stride` zero vectors there, until its length "
            "is a multiple of the stride, and heads see these too.",
        ),
    )
    subjects = ("cross",)
    stride: PositiveInt = 4  # heads that share the source among them; the paper's models: 4

    @classmethod
    def neutral(cls) -> Hepos:
        return cls(1)

    def idle(self, call: Call) -> bool:
        return not call.cross or self.stride == 1

    @at(Site.MASK)
    def share(self, mask: Mask, call: Call) -> Mask:
        if call.heads < self.stride:
            rule = f"must be at most the layer's {call.heads} heads, else no head sees some places"
            raise FieldError(self, "stride", self.stride, rule, call.heads)
        return mask & Strided(self.stride)


if __name__ == "__main__":
    import torch

    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.arange(3, 19)[None]
    with attach(model, Hepos(), only=("model.decoder.layers.0.encoder_attn",)) as run:
        print(run(input_ids=ids, decoder_input_ids=ids[:, :5]).logits.std(), run.activity())
