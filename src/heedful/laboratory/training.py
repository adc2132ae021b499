"""One training under one mechanism by transformers' Trainer, and the model that comes of it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import IterableDataset

from heedful.api import attach
from heedful.core.errors import ClashError, HeedfulError, InactiveWarning
from heedful.core.method import Method, Stack
from heedful.engine.run import Run
from heedful.laboratory.course import Batch, Course

Steps = Callable[[int], None]  # told how many steps are done


class MissingTrainer(HeedfulError, ImportError):
    """Trainings need an optional package."""

    def __init__(self) -> None:
        super().__init__("accelerate is not installed, and the lab trains with it: pip install 'heedful[lab]'")


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training leaves."""

    weights: dict[str, Tensor]  # the mechanism's own among them
    losses: list[float]  # of each step
    norms: list[float]  # of each step's gradient, before it is clipped
    parameters: int
    learned: int  # parameters of these that the mechanism brought
    seconds: float


class _Batches(IterableDataset):
    """A course's batches, each whole."""

    def __init__(self, course: Course, seed: int) -> None:
        self.course, self.seed = course, seed

    def __iter__(self) -> Iterator[Batch]:
        random = Generator().manual_seed(self.seed)
        while True:
            yield self.course.batch(self.seed, random)


def fresh(course: Course, what: Stack, seed: int) -> Run:
    """An untrained model under a stack: what is in no stack begins alike for all."""
    model = course.model(seed)
    torch.manual_seed(seed)  # what the stack draws is its own
    return attach(model, what, only=course.only)


def trial(course: Course, what: Stack) -> None:
    """One gradient of an untrained model: what cannot be trained says so here, in a moment."""
    with fresh(course, what, 0) as run:
        run(**course.batch(0, Generator().manual_seed(0)))["loss"].backward()


@contextmanager
def trainer_of(run: Run, course: Course, seed: int, report: Steps = lambda _: None) -> Iterator[Any]:
    """transformers' Trainer of a run's model by the course's recipe; the optimiser is what it makes."""
    try:
        import accelerate  # noqa: F401
    except ImportError as missing:
        raise MissingTrainer from missing
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Reports(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            report(state.global_step)

    recipe = course.recipe
    with tempfile.TemporaryDirectory() as nowhere:  # Trainer makes a folder even where it writes nothing
        arguments = TrainingArguments(
            nowhere, max_steps=course.steps, per_device_train_batch_size=1, learning_rate=recipe.rate,
            lr_scheduler_type="cosine", warmup_steps=min(recipe.warm_up, course.steps // 2),
            weight_decay=recipe.decay, adam_beta2=recipe.memory, max_grad_norm=recipe.longest,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=seed,
            dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(
            run.model, arguments, train_dataset=_Batches(course, seed), data_collator=lambda rows: rows[0],
            callbacks=[Reports()],
        )  # fmt: skip
        trainer.model_accepts_loss_kwargs = False  # the loss is the model's own, penalties among it
        trainer.remove_callback(PrinterCallback)
        yield trainer


def train(course: Course, what: Stack, seed: int, report: Steps = lambda _: None) -> Trained:
    """Train a fresh model under a stack."""
    run = fresh(course, what, seed)
    try:
        with trainer_of(run, course, seed, report) as trainer:
            ended = trainer.train()
        steps = [step for step in trainer.state.log_history if "loss" in step]
        weights = {name: p.detach().cpu().clone() for name, p in run.model.named_parameters()}
        return Trained(
            weights, [step["loss"] for step in steps], [step["grad_norm"] for step in steps],
            sum(p.numel() for p in weights.values()), sum(p.numel() for p in run.parameters()),
            ended.metrics["train_runtime"],
        )  # fmt: skip
    finally:
        run.close()


def beside(what: Stack, readers: tuple[Method, ...]) -> Stack:
    """A stack and those of the readers that can act beside it."""
    for reader in readers:
        try:
            what = what | reader
        except ClashError:
            continue
    return what


@contextmanager
def opened(course: Course, what: Stack, seed: int, weights: dict[str, Tensor], *readers: Method) -> Iterator[Run]:
    """A trained model under its stack, ready to be measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InactiveWarning)  # a record says whether a stack was active
        with fresh(course, beside(what, readers), seed) as run, torch.no_grad():
            put(run.model, weights)
            run.model.eval()
            yield run


def put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a model the weights of one like it."""
    for name, p in model.named_parameters():
        p.data.copy_(weights[name])
