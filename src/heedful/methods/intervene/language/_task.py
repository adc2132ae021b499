"""What methods that carry a task from prompts with examples to prompts without share: how they are fitted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import CatalogueEntry, FitContext, Session
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Mean
from heedful.kit.batches import Batch, read
from heedful.kit.head_search import at_end


def split(method: CatalogueEntry, batches: Iterable[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Prompts with examples, and those without, which have "target": their answers' first tokens `[b]`."""
    found = list(batches)
    shots, bare = [b for b in found if "target" not in b], [b for b in found if "target" in b]
    if not shots or not bare:
        good = [{"input_ids": "prompts with examples"}, {"input_ids": "prompts without", "target": "token ids"}]
        raise FieldError(method, "batches", (len(shots), len(bare)), 'must be some without "target", some with', good)
    return shots, bare


class _LastHeads(Method):
    """The mean of each head's output at the last token, `[h d]`."""

    paper = Paper("none", "A helper of fits", "heedful", 2026)

    @reads(Site.HEAD_OUTPUT)
    def last(self, heads: Tensor, call: Call) -> Mean:
        b, h, _, d = heads.shape
        place = call.last[:, None, :, None].expand(b, h, 1, d)
        return Mean.of(heads.gather(2, place)[:, :, 0].double().sum(0), b)


def mean_heads(context: FitContext, prompts: Iterable[Batch]) -> dict[int, Tensor]:
    """What each head hands over at a prompt's last token, the mean over prompts, `[h d]` by layer."""
    return {layer: mean.value.float() for layer, mean in read(context, _LastHeads(), prompts).items()}


def next_logits(run: Session, inputs: Batch) -> Tensor:
    """The logits after each text's last token, `[b vocabulary]`."""
    return at_end(run(**inputs).logits, inputs).float()


def learn_answers(run: Session, bare: list[Batch], steps: int, optimiser: torch.optim.Optimizer) -> None:
    """Gradient steps that make the answers' first tokens likely, going round the batches."""
    for step in range(steps):
        inputs = dict(bare[step % len(bare)])
        target = inputs.pop("target")
        loss = torch.nn.functional.cross_entropy(next_logits(run, inputs), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
