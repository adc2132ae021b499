"""R_l = A_l R_(l-1), R_0 = I, with A_l the head mean of W_l plus I, each row divided by its sum."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.errors import FieldError
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.methods.explain._layer_by_layer import LayerByLayer


class AttentionRollout(LayerByLayer):
    """How much of each input token is mixed into each position after the last layer, `[b n s]` for every forward.

    Rows stand as the tokens were fed, padding rows being zero; columns are the text positions in `sources`.
    """

    paper = Paper(
        "P098",
        "Quantifying Attention Flow in Transformers",
        "Samira Abnar, Willem Zuidema",
        2020,
        "2005.00928",
        "ACL 2020",
        differs=(
            "The authors' code form is used, which divides by the row sum; the paper's 0.5 W + 0.5 I is the same where "
            "weights sum to one.",
            "Decoding steps are left out: rollout needs all rows at once, and a step has one.",
            "It runs in causal models too, which the paper does not study; there mass drifts to early tokens.",
        ),
    )
    one_text = True

    sources: tuple[int, ...] | None = None  # text positions to trace; None: all, at N x N memory

    def __post_init__(self) -> None:
        given = self.sources
        if given is not None and (not given or len(set(given)) < len(given) or min(given) < 0):
            raise FieldError(self, "sources", given, "must be one or more unlike positions from 0 up", (0, 1))

    @reads(Site.PATTERN)
    def mix(self, weights: Tensor, call: Call) -> Statistic | None:
        self.require_whole(call)
        mean = weights.detach().mean(1)  # [b r k]
        before = self.below(call)
        if before is None:
            keys, own = (self._identity(x, call).to(mean.dtype) for x in (call.k_pos, call.q_pos))
        else:
            keys, own = self.of_tile(before, mean, call)
        mixed = (mean @ keys + own) / (mean.sum(-1, keepdim=True) + 1)
        mixed = mixed * call.is_text[:, 0, :, None]
        self.keep(mixed, call)
        return Cat.of(f"{call.rows.start:09d}", mixed) if call.last_layer else None

    def finish(self, statistic: Statistic, call: Call) -> Statistic:
        return Cat.of(f"{call.forward:06d}", torch.cat(statistic.value, 1))

    def answer(self, readings: Readings) -> list[Tensor]:
        """One `[b n s]` for each forward, in their order."""
        return [x for stat in readings.values() for x in stat.value]

    def _identity(self, position: Tensor, call: Call) -> Tensor:
        """Which source each token is, `[b|1 n s]`."""
        if self.sources is not None:
            sources = torch.tensor(self.sources, device=position.device)
        else:
            sources = torch.arange(self._length(call), device=position.device)
        return position[:, 0, :, None] == sources

    def _length(self, call: Call) -> int:
        if call.hidden is None:
            raise FieldError(self, "sources", None, f"{call.name} does not show its length; name positions", (0, 1))
        return call.hidden.shape[1]


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.encoder()
    text = tokenizer("The keys to the cabinet are on the table", return_tensors="pt")
    with attach(model, AttentionRollout()) as run:
        run(**text)
        shares = run[AttentionRollout()][0][0, 0]
    for token, share in zip(tokenizer.convert_ids_to_tokens(text.input_ids[0]), shares, strict=True):
        print(f"{share:6.1%}  {token}")
