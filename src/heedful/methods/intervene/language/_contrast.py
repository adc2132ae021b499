"""What methods that steer by a contrast share: what texts with a trait end in, and what texts without it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.method import FitContext, Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.kit.batches import Batch


class _LastHeads(Method):
    """What each head hands over at each text's last token, `[b h d]`."""

    @reads(Site.HEAD_OUTPUT)
    def read(self, heads: Tensor, call: Call) -> Cat:
        b, h, _, d = heads.shape
        return Cat.of("end", heads.double().gather(2, call.last[:, None, :, None].expand(b, h, 1, d))[:, :, 0])


class _LastStates(Method):
    """The residual stream at each text's last token, `[b e]`."""

    @reads(Site.RESIDUAL)
    def read(self, stream: Tensor, call: Call) -> Cat:
        b, _, e = stream.shape
        return Cat.of("end", stream.double().gather(1, call.last[..., None].expand(b, 1, e))[:, 0])


_ENDS: dict[Site, Method] = {Site.HEAD_OUTPUT: _LastHeads(), Site.RESIDUAL: _LastStates()}


@dataclass(frozen=True, eq=False)
class Contrast:
    """One layer's ends of texts, in the order in which they were read."""

    trait: Tensor  # [texts ...]
    other: Tensor  # [texts ...]

    @property
    def difference(self) -> Tensor:
        """The mean over texts with the trait, less the mean over the others."""
        return self.trait.mean(0) - self.other.mean(0)


def contrast(
    owner: object, context: FitContext, site: Site, batches: Iterable[Batch], paired: bool = False
) -> dict[int, Contrast]:
    """By layer, what texts end in at a site, of batches with "positive", a bool for the batch or `[b]`.

    Where they are `paired`, the first text with the trait goes with the first without, and so on.
    """
    reader = _ENDS[site]
    found: dict[int, list[Tensor]] = {}
    marks: list[Tensor] = []
    for batch in batches:
        inputs: dict[str, Any] = dict(batch)
        if "positive" not in inputs:
            raise FieldError(owner, "batches", sorted(inputs), "need 'positive' in each", {"positive": True})
        positive = torch.as_tensor(inputs.pop("positive")).reshape(-1).bool()
        with torch.no_grad(), context.attach(reader) as run:
            run(**inputs)
            for layer, kept in run[reader].items():
                found.setdefault(layer, []).append(kept.value[0])
        marks.append(positive.expand(len(next(iter(found.values()))[-1])))
    with_it = torch.cat(marks) if marks else torch.zeros(0, dtype=torch.bool)
    counts = int(with_it.sum()), int((~with_it).sum())
    if 0 in counts:
        raise FieldError(owner, "batches", len(marks), "must hold positive and other texts", {"positive": True})
    if paired and counts[0] != counts[1]:
        raise FieldError(owner, "batches", counts, "must hold a text without the trait for each one with it", (8, 8))
    joined = {layer: torch.cat(each) for layer, each in found.items()}
    return {layer: Contrast(x[with_it.to(x.device)], x[~with_it.to(x.device)]) for layer, x in joined.items()}
