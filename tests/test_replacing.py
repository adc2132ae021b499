"""ReAGent step by step, run by run, in plain numbers, with the changed texts it drew; and what it names and refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, RefusedModel
from heedful.explaining import ReAGent, attribute

IDS = torch.tensor([[5, 17, 9, 88, 40, 23, 61]])


def chances(model, text: Tensor, position: int = -1) -> list[float]:
    """How likely each token is to follow."""
    with torch.no_grad():
        return model(input_ids=text[None]).logits[0, position].softmax(-1).tolist()


def by_hand(model, settings: ReAGent, target: int, position: int = -1) -> tuple[list[float], list[int]]:
    """Scores, and how many steps each run took; drawn in the order in which the class draws."""
    n, draw = IDS.shape[1], torch.Generator().manual_seed(settings.seed)
    words = torch.tensor(settings.among or range(128))
    whole = chances(model, IDS[0], position)[target]
    sums = torch.rand(settings.runs, n, generator=draw).tolist()
    taken = [0] * settings.runs
    still = list(range(settings.runs))
    for step in range(settings.steps):
        changed = (torch.rand(len(still), n, generator=draw) < settings.replaced).tolist()
        drawn = words[torch.randint(len(words), (len(still), n), generator=draw)]
        for row, run in enumerate(still):
            text = torch.tensor([int(drawn[row, i]) if changed[row][i] else int(IDS[0, i]) for i in range(n)])
            fall = whole - chances(model, text, position)[target]
            for i in range(n):
                sums[run][i] += math.log((1 + fall) / (1 - fall)) * (1 if changed[row][i] else -1)
        drawn = words[torch.randint(len(words), (len(still), n), generator=draw)]
        left = []
        for row, run in enumerate(still):
            taken[run] = step + 1
            best = sorted(range(n), key=lambda i: -sums[run][i])[: settings.kept]
            text = torch.tensor([int(IDS[0, i]) if i in best else int(drawn[row, i]) for i in range(n)])
            answers = chances(model, text, position)
            if target not in sorted(range(128), key=lambda t: -answers[t])[: settings.within]:
                left.append(run)
        still = left
        if not still:
            break
    counted = [run for run in range(settings.runs) if run not in still] or list(range(settings.runs))
    powers = {run: [math.exp(x) for x in sums[run]] for run in counted}
    return [sum(powers[r][i] / sum(powers[r]) for r in counted) / len(counted) for i in range(n)], taken


@pytest.mark.parametrize(
    ("settings", "stays"),
    [
        (ReAGent(kept=3, within=40, runs=4, steps=30), None),
        (ReAGent(kept=2, within=20, runs=3, steps=4, among=(7, 8, 9, 100), seed=3), None),
        (ReAGent(replaced=0.7, kept=1, within=1, runs=3, steps=5, seed=1), True),
        (ReAGent(kept=9, within=128, runs=2, steps=5), False),
    ],
)
def test_is_the_papers_recursion(settings: ReAGent, stays: bool | None) -> None:
    model = models.tiny("llama")
    target = 50
    found = attribute(model, IDS, settings, target=target)
    wanted, taken = by_hand(model, settings, target)
    assert close(found.scores, torch.tensor(wanted))
    assert float(found.scores.sum()) == pytest.approx(1.0)
    if stays is None:
        assert len(set(taken)) > 1  # some runs end before others
    else:
        assert set(taken) == {settings.steps if stays else 1}


def test_a_prediction_within_a_text_is_read_there() -> None:
    model = models.tiny("bert")
    settings = ReAGent(kept=3, within=40, runs=2, steps=6)
    found = attribute(model, IDS, settings, target=50, position=2)
    assert close(found.scores, torch.tensor(by_hand(model, settings, 50, 2)[0]))


@pytest.mark.parametrize("sure", [12, 1000])  # with the second a change takes the whole probability
def test_the_token_that_is_read_alone_is_the_one_that_counts(sure: int) -> None:
    class Reads(torch.nn.Module):
        """Says what stands third, whatever else does."""

        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(128, 128)
            self.table.weight.data = sure * torch.eye(128)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.table

        def forward(self, input_ids: Tensor):
            logits = self.table(input_ids[:, 2:3]).expand(-1, input_ids.shape[1], -1)
            return type("Output", (), {"logits": logits})()

    from heedful.explaining.aim import Aim

    settings = ReAGent(kept=1, within=1)
    scores = settings.scores(Reads(), IDS, Aim("token", 9, 6))
    assert int(scores.argmax()) == 2
    assert float(scores[2]) > 0.5
    assert close(settings.scores(Reads(), IDS, Aim("token", 9, 6)), scores)
    assert not close(ReAGent(kept=1, within=1, seed=4).scores(Reads(), IDS, Aim("token", 9, 6)), scores)


def test_the_model_stays_and_the_answer_says_how_it_was_found() -> None:
    model = models.tiny("llama").train()
    found = attribute(model, IDS, ReAGent(steps=2))
    assert model.training
    assert found.method == repr(ReAGent(steps=2))
    assert len(found) == 7


def test_says_what_is_wrong() -> None:
    for name, bad in (("replaced", 0.0), ("replaced", 1.0), ("kept", 0), ("within", 0), ("runs", 0), ("steps", 0)):
        with pytest.raises(FieldError, match=f"ReAGent.{name}"):
            ReAGent(**{name: bad})
    assert ReAGent(replaced=0.99, kept=1, within=1, runs=1, steps=1).steps == 1
    model = models.tiny("llama")
    for among in ((3, 128), (-1, 5)):
        with pytest.raises(FieldError, match="from 0 to 127"):
            attribute(model, IDS, ReAGent(among=among))
    attribute(model, IDS, ReAGent(among=(0, 127), steps=1))
    with pytest.raises(FieldError, match="looks at nothing"):
        attribute(model, IDS, ReAGent(), only="model")
    with pytest.raises(RefusedModel, match="no probability"):
        attribute(models.tiny("bert").bert, IDS, ReAGent())
