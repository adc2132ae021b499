"""transformers' Trainer on a model with a stack attached: it trains, saves, and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from heedful import attach, load
from heedful.methods import ClippedSoftmax, GatedHeads, MixtureOfHeads, SigmoidAttention
from heedful.tiny import tiny

ROWS = torch.randint(3, 100, (16, 12), generator=torch.Generator().manual_seed(0))
STACKS = {
    "gates": ClippedSoftmax() | GatedHeads(),
    "moh": MixtureOfHeads(2, 1),  # with a penalty in the model's own loss
    "sigmoid": SigmoidAttention(),
}


def train(model: Any, out: Path, since: Path | None = None) -> list[float]:
    """The losses of six steps, all or those after a checkpoint; dropout draws random numbers on the way."""
    arguments = TrainingArguments(
        str(out), max_steps=6, save_steps=3, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, use_cpu=True, seed=3,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ROWS])
    trainer.train(resume_from_checkpoint=since and str(since))
    return [step["loss"] for step in trainer.state.log_history if "loss" in step]


@pytest.mark.parametrize("name", STACKS)
def test_a_trainer_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    stack, half = STACKS[name], tmp_path / "whole" / "checkpoint-3"

    def fresh() -> Any:
        return tiny("llama", attention_dropout=0.1)

    model = fresh()
    with attach(model, stack) as run:
        start = [p.detach().clone() for p in run.parameters()]
        losses = train(model, tmp_path / "whole")
        assert all(not torch.equal(p, was) for p, was in zip(run.parameters(), start, strict=True))
        trained = {key: x.clone() for key, x in model.state_dict().items()}
    assert len(set(losses)) == 6

    model = fresh()
    with attach(model, stack):
        assert train(model, tmp_path / "again", half) == losses
        assert all(torch.equal(x, trained[key]) for key, x in model.state_dict().items())
    with load(half) as run:
        assert train(run.model, tmp_path / "loaded", half) == losses
    with load(tmp_path / "whole" / "checkpoint-6") as run:
        assert run.model.state_dict().keys() == trained.keys()
        assert all(torch.equal(x, trained[key]) for key, x in run.model.state_dict().items())
