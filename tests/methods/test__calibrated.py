"""What calibrated rounding reads of a model, batch by batch and in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from heedful import attach, models
from heedful.adapters.choosing import adapter_for
from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Sum
from heedful.methods.compress.quantise._calibrated import HANDED_ON, SHOWN, readings


class Rows(Method):
    """The pattern, row by row."""

    paper = Paper("T000", "A test", "Ada Tester", 2026)

    @reads(Site.PATTERN)
    def read(self, pattern: torch.Tensor, call: Call) -> Cat:
        return Cat.of(f"{call.rows.start or 0:09d}", call.by_key(pattern, 8))


class Queries(Method):
    """How many queries there were."""

    paper = Rows.paper

    @reads(Site.QUERY)
    def read(self, query: torch.Tensor, call: Call) -> Sum:
        return Sum.of(torch.tensor([float(query.shape[2])]))


class InTiles:
    """A context whose runs see three rows at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def attach(self, what: Any) -> Any:
        return attach(self.model, what, backend="tiled", tile_rows=3)


def test_each_batch_by_itself_and_padding_is_zero() -> None:
    model = models.tiny("llama")
    ids = torch.randint(3, 100, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1, :5]}]

    layer = adapter_for(model, None).sizes()[1]
    context: Any = InTiles(model)
    given: list[torch.Tensor] = []
    part = model.model.layers[1].self_attn
    hooks = [
        part.q_proj.register_forward_pre_hook(lambda _, args: given.append(args[0])),
        part.o_proj.register_forward_pre_hook(lambda _, args: given.append(args[0])),
    ]
    with torch.no_grad():
        found: Iterator[Any] = readings(context, layer, (SHOWN, HANDED_ON, Rows(), Queries()), batches)
        for batch, (shown, handed_on, pattern, queries) in zip(batches, found, strict=True):
            is_text = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None]
            for x, own in ((shown, given[-2]), (handed_on, given[-1])):
                assert x.dtype == torch.float64
                assert torch.equal(x, own.double() * is_text)
            n = batch["input_ids"].shape[1]
            assert pattern.shape == (len(is_text), 4, n, 8)
            assert torch.equal(pattern, pattern.tril())
            assert pattern.sum() > 4 * n - 1
            assert queries.item() == n
    for hook in hooks:
        hook.remove()
