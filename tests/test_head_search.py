"""Scores that a search over heads goes by; the searches themselves are tested with their methods."""

from __future__ import annotations

from typing import Any

import torch

from heedful import fit, models
from heedful.conformance.tolerances import close_model
from heedful.core.entry import FitContext
from heedful.core.method import Method, Stack
from heedful.core.paper import Paper
from heedful.core.sites import Site, at
from heedful.kit.head_search import gains, scores


class _Search(Method):
    """Keeps what the search's functions say."""

    paper = Paper("tests", "A test", "heedful", 2026, venue="heedful")
    kept: Any = None

    @at(Site.HEAD_OUTPUT)
    def silence(self, heads: torch.Tensor, call: Any) -> torch.Tensor:
        return torch.zeros_like(heads)

    def fit(self, context: FitContext, batches: Any) -> Any:
        found = list(batches)
        return (
            scores(context, Stack(), found),
            scores(context, self.on(1, 2), found),
            gains(context, self, [(1, 2)], found),
        )


def test_scores_of_text_targets_and_options() -> None:
    model = models.tiny("llama", num_hidden_layers=2)
    ids = models.tiny_inputs(model, batch=2, length=12)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[0, -2:] = 0
    options, target = torch.tensor([[5, 6], [9, 7]]), torch.tensor([4, 8])
    inputs = {"input_ids": ids, "attention_mask": mask}
    batches = [inputs, {**inputs, "target": target}, {**inputs, "options": options}]
    plain, edited, gained = fit(_Search(), model, batches)
    with torch.no_grad():
        logits = model(**inputs).logits
    wanted = []
    for b, (start, stop) in enumerate(((0, 10), (3, 12))):
        chances = logits[b].log_softmax(-1)
        wanted.append(torch.stack([chances[i - 1, ids[b, i]] for i in range(start + 1, stop)]).mean())
    ends = logits[torch.arange(2), torch.tensor([9, 11])]
    wanted += [ends[b].log_softmax(-1)[target[b]] for b in range(2)]
    wanted += [ends[b, options[b]].log_softmax(-1)[0] for b in range(2)]
    assert close_model(plain, torch.stack(wanted))
    assert not close_model(edited, plain)
    assert gained == {(1, 2): float(edited.mean() - plain.mean())}
