"""Loss + weight sum_i (1 - sum_t a_ti)^2: over all that is written, each place of the source is looked at once."""

from __future__ import annotations

from torch import Tensor

from heedful.authoring import Call, Method, NonNegativeFloat, Paper, SiteError, Summary, sums


class DoublyStochastic(Method):
    """A loss for training cross-attention: what a source's places receive from all rows shall add up to one each.

    It is of whole calls, in which all that is written is read at once, as in training.
    """

    paper = Paper(
        "P071",
        "Show, Attend and Tell: Neural Image Caption Generation with Visual Attention",
        "Kelvin Xu, Jimmy Ba, Ryan Kiros, Kyunghyun Cho, Aaron Courville, Ruslan Salakhutdinov, Richard Zemel, "
        "Yoshua Bengio",
        2015,
        "1502.03044",
        "ICML 2015",
        differs=(
            "The paper's doubly stochastic attention alone: its additive scores, its gate on the context, and hard "
            "attention, which draws a place, are left out.",
            "The map of a layer is the mean over its heads, and the losses of layers are added up; the authors have "
            "one layer of one head.",
            "It is the paper's sum over places, the mean over texts; the authors' code adds it up over the texts of a "
            "batch and takes the mean over places, so that their weight of 1 is here their texts over their places.",
            "The authors add it to a loss that is summed over the words of a caption; where a model's loss is the mean "
            "over words, the same weight is that over their number.",
        ),
    )
    subjects = ("cross",)
    weight: NonNegativeFloat = 1.0  # lambda, beside a loss summed over words; the authors' code: 1, of another mean

    @classmethod
    def neutral(cls) -> DoublyStochastic:
        return cls(0.0)

    def idle(self, call: Call) -> bool:
        return not call.cross or self.weight == 0

    @sums("received", penalises=True)
    def uneven(self, pattern: Summary, call: Call) -> Tensor:
        if pattern.received is None or pattern.seen is None:
            raise SiteError(f"{self!r}, layer {call.layer}: the pattern's column sums are not known")
        source = (pattern.seen > 0).any(1)  # [b k]: a place that is padding is no part of it
        left = (1 - pattern.received.mean(1)).square() * source
        return self.weight * left.sum() / len(left)


if __name__ == "__main__":
    import torch

    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.arange(3, 19)[None]
    with attach(model, DoublyStochastic(), only=("model.decoder.layers.0.encoder_attn",)) as run:
        print(run(input_ids=ids, decoder_input_ids=ids[:, :5], labels=ids[:, :5]).loss.item(), run.loss().item())
