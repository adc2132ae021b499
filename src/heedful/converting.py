"""A copy of a model, taught another attention: each layer by itself, then the whole; resumed where it stopped."""

from __future__ import annotations

import hashlib
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from heedful.adapters.choosing import adapter_for
from heedful.adapters.wrapped import unwrapped
from heedful.core.call import Call
from heedful.core.errors import FieldError, FoldError, InactiveWarning, RefusedModel, StatisticError
from heedful.core.files import TAUGHT, digest_of, folder_for, held, placed, sealed
from heedful.core.fitted import Fitted
from heedful.core.kinds.conversion import Conversion, Progress, Report
from heedful.core.method import Method, Stack, as_stack
from heedful.core.sites import Site, at, penalises, reads
from heedful.core.stats import Cat
from heedful.engine.resting import resting
from heedful.engine.run import Run
from heedful.folding import rewritten

PAUSE = 60.0  # seconds from one saved state to the next
GOOD = [{"input_ids": "..."}]
ADAM = ("exp_avg", "exp_avg_sq", "step")


class _OfLayers(Method):
    """What the model's own layers are shown and give, kept whole for one forward."""

    @reads(Site.HIDDEN)
    def shown(self, x: Tensor, call: Call) -> Cat:
        return Cat.of("x", x)

    @reads(Site.OUTPUT)
    def given(self, x: Tensor, call: Call) -> Cat:
        return Cat.of("x", x)


class _OfStream(Method):
    """The model's own stream as it leaves each layer."""

    @reads(Site.RESIDUAL)
    def left(self, x: Tensor, call: Call) -> Cat:
        return Cat.of("x", x)


@dataclass(eq=False)
class _Board:
    """The lesson of the batch at hand, by what it is of and layer."""

    how: Conversion
    seen: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def apart(self, of: Callable[[Tensor, Tensor], Tensor], name: str, x: Tensor, call: Call) -> Tensor:
        """How far the tokens of a text are from the lesson; padding counts for nothing."""
        is_text = call.is_text[:, 0].expand(x.shape[:2])
        return of(x[is_text], self.seen[name, call.layer][is_text])


class _ByItself(Method):
    """A layer is shown what the model's own was shown, and judged by what that gave."""

    board: _Board

    @at(Site.HIDDEN)
    def show(self, x: Tensor, call: Call) -> Tensor:
        return self.board.seen["shown", call.layer]

    @penalises(Site.OUTPUT)
    def judge(self, x: Tensor, call: Call) -> Tensor:
        if call.cross:
            rule = f"acts in layer {call.layer}, which looks at another stream, and that is not the model's own"
            good = f"{self.board.how.target!r}, restricted by .on(layers=...) to self-attention, or layer_epochs=0"
            raise FieldError(self.board.how, "target", self.board.how.target, rule, good)
        return self.board.apart(self.board.how.of_layer, "given", x, call)


class _Along(Method):
    """The stream is judged as it leaves each layer."""

    board: _Board

    @penalises(Site.RESIDUAL)
    def judge(self, x: Tensor, call: Call) -> Tensor:
        return self.board.apart(self.board.how.of_stream, "left", x, call)


def converted(
    how: Conversion,
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    only: str | Iterable[str] | None,
    out: str | Path | None,
    progress: Report | None,
) -> Run:
    """A copy of the model, taught to be like it under the target; see `heedful.fit`."""
    found, folder, stack = list(batches), folder_for("fit()", out), as_stack(how.target)
    if not found:
        raise FieldError(how, "batches", 0, "must be 1 or more", GOOD)
    only = only if only is None or isinstance(only, str) else tuple(only)
    student = _copy(how, model, only)
    run = Run(student, stack, adapter_for(student, only))
    try:
        layers = tuple(
            i for i in range(len(run.layer_names)) if how.surgery or any(not step.edit.reads for step in stack.steps(i))
        )
        if not layers:
            rule = "edits no layer, so there is nothing to teach"
            raise FieldError(how, "target", how.target, rule, "SinkWindow(4, 256)")
        run.pause()
        with (
            held(folder, "a conversion"), resting(model), resting(student), torch.enable_grad(),
            warnings.catch_warnings(),
        ):  # fmt: skip
            warnings.simplefilter("ignore", InactiveWarning)
            _School(how, model, student, stack, only, layers, found, folder, progress or (lambda _: None)).teach()
        run.resume()
    except BaseException:
        run.close()
        raise
    return run


def _copy(how: Conversion, model: nn.Module, only: str | tuple[str, ...] | None) -> nn.Module:
    """The model with its surgery, to be taught."""
    inner = unwrapped(model)
    if low := {str(p.dtype) for p in inner.parameters() if p.is_floating_point()} - {"torch.float32", "torch.float64"}:
        raise RefusedModel(
            f"{type(inner).__name__} has weights in {min(low)}, where the small steps of training are lost; load it "
            "with dtype=torch.float32"
        )
    with torch.no_grad():
        student, unsaved = rewritten(inner, () if how.surgery is None else (how.surgery,), only, "fit()")
    if unsaved:
        raise FoldError(f"{type(inner).__name__} could not be loaded again after {how.surgery!r}: {unsaved}")
    return student


@dataclass(eq=False)
class _School:
    """The model that teaches, the copy that is taught, and what becomes of them on the disk."""

    how: Conversion
    teacher: nn.Module
    student: nn.Module
    stack: Stack
    only: str | tuple[str, ...] | None
    layers: tuple[int, ...]
    batches: list[Mapping[str, Any]]
    folder: Path | None
    report: Report

    def __post_init__(self) -> None:
        self.board = _Board(self.how)
        takes = inspect.signature(self.teacher.forward).parameters
        self.fixed = {"use_cache": False} if "use_cache" in takes else {}
        self.saved = time.monotonic()

    def teach(self) -> None:
        """Both stages, from where they stopped."""
        wanted = [(p, p.requires_grad) for p in self.student.parameters()]
        key = self._key() if self.folder else ""
        stage, done, adam = self._found(key)
        try:
            for number, (name, epochs) in enumerate((("layers", self.how.layer_epochs), ("whole", self.how.epochs))):
                if number >= stage:
                    start, moments = (done, adam) if number == stage else (0, {})
                    self._stage(key, number, name, epochs * len(self.batches), start, moments)
        finally:
            for p, was in wanted:
                p.requires_grad_(was)
                p.grad = None

    def _stage(self, key: str, number: int, name: str, total: int, done: int, moments: dict[str, Tensor]) -> None:
        """Steps of one stage. What is not taught in it gets no gradient."""
        self.student.requires_grad_(False)
        learns = self._in_layers() if name == "layers" else list(self.student.parameters())
        for p in learns:
            p.requires_grad_(True)
        rate = self.how.layer_rate if name == "layers" else self.how.rate
        optimiser = torch.optim.Adam(learns, lr=rate)
        _remember(optimiser, moments)
        self._save(key, number, done, optimiser)
        self.report(Progress(name, done, total, f"goes on after {done} steps" if done else ""))
        step = self._by_itself if name == "layers" else self._as_a_whole
        with step() as loss_of:
            while done < total:
                optimiser.zero_grad()
                loss = loss_of(self.batches[done % len(self.batches)])
                if not math.isfinite(value := loss.item()):
                    field = "layer_rate" if name == "layers" else "rate"
                    rule = f"was too much: the loss is {value} after {done} steps"
                    raise FieldError(self.how, field, rate, rule, rate / 10)
                loss.backward()
                optimiser.step()
                done += 1
                if time.monotonic() - self.saved >= PAUSE:
                    self._save(key, number, done, optimiser)
                self.report(Progress(name, done, total, f"loss {value:.4g}"))
        self._save(key, number, done, optimiser)

    def _in_layers(self) -> list[nn.Parameter]:
        """What the attention modules of the taught layers hold, what the target brought among it."""
        adapter = adapter_for(self.student, self.only)
        modules = [adapter.model.get_submodule(adapter.layer_names[i]) for i in self.layers]
        return list({id(p): p for module in modules for p in module.parameters()}.values())

    @contextmanager
    def _by_itself(self) -> Iterator[Callable[[Mapping[str, Any]], Tensor]]:
        what = self.stack | _ByItself(self.board).on(layers=self.layers)
        lesson = Stack() | _OfLayers().on(layers=self.layers)
        with self._attached(self.teacher, lesson) as own, self._attached(self.student, what) as run:

            def loss(batch: Mapping[str, Any]) -> Tensor:
                self._look(own, batch)
                run(**batch, **self.fixed)
                return run.loss()

            yield loss

    @contextmanager
    def _as_a_whole(self) -> Iterator[Callable[[Mapping[str, Any]], Tensor]]:
        what, lesson = self.stack, Stack()
        if self.how.features:
            what, lesson = what | _Along(self.board).on(layers=self.layers), lesson | _OfStream().on(layers=self.layers)
        with self._attached(self.teacher, lesson) as own, self._attached(self.student, what) as run:

            def loss(batch: Mapping[str, Any]) -> Tensor:
                wanted = self._look(own, batch)
                found = run(**batch, **self.fixed).logits
                is_text = self._is_text(batch, found)
                whole = self.how.of_whole(found[is_text], wanted[is_text])
                return whole + self.how.features * run.loss() / len(self.layers) if self.how.features else whole

            yield loss

    def _attached(self, model: nn.Module, what: Stack) -> Run:
        return Run(model, what, adapter_for(model, self.only))

    @torch.no_grad()
    def _look(self, own: Run, batch: Mapping[str, Any]) -> Any:
        """The model's own forward: its logits, and its lesson on the board."""
        out = own(**batch, **self.fixed)
        self.board.seen = {(name, i): stat.value[0] for (_, name, i), stat in own.state.statistics.items()}
        own.reset()
        logits = getattr(out, "logits", None)
        if logits is None and self.how.epochs:
            rule = f"must be 0, since {type(self.teacher).__name__} gives no logits; layers can be taught alone"
            raise FieldError(self.how, "epochs", self.how.epochs, rule, 0)
        return logits

    def _is_text(self, batch: Mapping[str, Any], logits: Tensor) -> Tensor:
        """Which logits count: all but those of padding."""
        both = getattr(getattr(self.teacher, "config", None), "is_encoder_decoder", False)
        mask = batch.get("decoder_attention_mask" if both else "attention_mask")
        shape = logits.shape[:-1]
        return logits.new_ones(shape, dtype=torch.bool) if mask is None or mask.shape != shape else mask.bool()

    # on the disk

    def _key(self) -> str:
        """A name for all that settles the outcome."""
        told = [repr(self.how), repr(self.only), Fitted(dict(self.teacher.named_parameters())).digest]
        for batch in self.batches:
            tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
            told += [Fitted(tensors).digest, *(f"{name}={x!r}" for name, x in batch.items() if name not in tensors)]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def _save(self, key: str, stage: int, done: int, optimiser: torch.optim.Adam) -> None:
        self.saved = time.monotonic()
        if self.folder is None:
            return
        tensors = {f"model.{name}": p.detach().contiguous() for name, p in self.student.named_parameters()}
        for i, state in optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": state[name].contiguous() for name in ADAM}
        told = {"key": key, "stage": str(stage), "done": str(done), "tensors": Fitted(tensors).digest}
        with placed(self.folder / TAUGHT) as beside:
            save_file(tensors, beside, metadata=sealed(told))

    def _found(self, key: str) -> tuple[int, int, dict[str, Tensor]]:
        """The stage and the step to go on from, with the copy as it was then, and what Adam knew."""
        if self.folder is None or not (path := self.folder / TAUGHT).exists():
            return 0, 0, {}
        try:
            with safe_open(path, "pt") as file:
                told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if told["digest"] != digest_of(told) or told["tensors"] != Fitted(tensors).digest:
                raise ValueError("its checksum is another")
            if told["key"] != key:
                raise StatisticError(
                    f"{path} is of another conversion: of other settings, weights or batches; name another folder"
                )
            stage, done = int(told["stage"]), int(told["done"])
            with torch.no_grad():
                for name, p in self.student.named_parameters():
                    p.copy_(tensors[f"model.{name}"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise StatisticError(f"{path} was damaged ({error}); remove it to begin anew") from error
        return stage, done, {name: x for name, x in tensors.items() if name.startswith("adam.")}


def _remember(optimiser: torch.optim.Adam, moments: Mapping[str, Tensor]) -> None:
    """Give Adam back what it knew."""
    state: dict[int, dict[str, Tensor]] = {}
    for place, x in moments.items():
        _, i, name = place.split(".")
        state.setdefault(int(i), {})[name] = x
    if state:
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
