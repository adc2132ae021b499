"""How much attention the end of a prompt gives each of its documents: what methods that put them in order go by."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Statistic, Sum


class _DocumentAttention(Method):
    """What the last row of a prompt gives to each span of a role, heads averaged."""

    role: str
    last: int  # the position of the prompt's last token

    @reads(Site.PATTERN)
    def sum_spans(self, weights: Tensor, call: Call) -> Statistic | None:
        row = (call.q_pos[0, 0] == self.last).nonzero().flatten()
        if not len(row):
            return None
        given = weights[:, :, int(row)]  # [b h k]
        place = call.pairs.k[..., 0, :]
        sums = [(given * ((place >= start) & (place < stop))).sum(-1).mean() for start, stop in call.region(self.role)]
        return Sum.of(torch.stack(sums))

    def answer(self, readings: Readings) -> Tensor:
        """The scores of the documents, layers averaged."""
        return torch.stack(readings.values_by_layer).mean(0)
