"""What verbs that compare layers share: states behind each layer, and batches whose inputs are named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heedful.api import attach, still
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.kit.batches import at_least_one


class _Streams(Method):
    """The stream as it leaves each layer, at tokens that are no padding."""

    @reads(Site.RESIDUAL)
    def keep(self, stream: Tensor, call: Call) -> Cat:
        return Cat.of("x", stream[call.is_text[:, 0].expand(len(stream), -1)].float())


STREAMS = _Streams()


def named(verb: str, batches: Iterable[object]) -> Iterator[Mapping[str, Any]]:
    """The batches one by one, each of which must say what each input is; refused where there are none."""
    for batch in at_least_one(verb, batches):
        if not isinstance(batch, Mapping):
            rule = "must hold what a model is called with, by name"
            raise FieldError(verb, "batches", batch, rule, [{"input_ids": "..."}])
        yield batch


def streams(model: nn.Module, batch: Mapping[str, Any], only: str | None = None) -> dict[str, Tensor]:
    """States of all tokens behind each layer, `[tokens e]` by the layer's name, for one call of a model."""
    with torch.no_grad(), still(model), attach(model, STREAMS, only=only, backend="reference") as run:
        run(**batch)
        return {run.layer_names[layer]: stat.value[0] for layer, stat in run[STREAMS].items()}
