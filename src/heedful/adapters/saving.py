"""What a model is saved with while a run is attached to it, and what a model says that it was saved with.

The stack goes into the model's config, which transformers takes along wherever a model goes: into a folder, a trainer's
checkpoint, a hub, and back. What a stack learned is among the model's weights; what was fitted lies beside them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from heedful.adapters.hooked import Standing
from heedful.core.errors import FieldError, ModelError
from heedful.core.files import placed, writing
from heedful.core.fitted import Fitted
from heedful.core.method import Part, Stack
from heedful.core.spelling import fitted_in, spelled
from heedful.engine.run import Run

KEY = "heedful"  # of the config
FORMAT = 1
TENSORS = "heedful.safetensors"
# the name of an empty tensor among the weights, for those who load them without the stack: transformers prints it; no
# brackets, since transformers makes some models' names anew by patterns
MARK = "heedful.load brings back the stack that this was saved with"
SAVE = "save_pretrained"


class Saved(NamedTuple):
    """The stack that a model was saved with, as it is written."""

    only: tuple[str, ...] | None
    parts: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        return " | ".join(str(part.get("method")) for part in self.parts)


def saved_with(config: Any) -> Saved | None:
    """What a config says of the stack that its model was saved with."""
    told = getattr(config, KEY, None)
    if told is None:
        return None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ModelError(f"the config's {KEY!r} was written by another release of heedful, or by hand: {told!r}")
    only, parts = told.get("only"), told.get("parts")
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise ModelError(f"the config's {KEY!r} was damaged: its parts are {parts!r}")
    if only is not None and not (isinstance(only, list) and only and all(isinstance(x, str) for x in only)):
        raise ModelError(f"the config's {KEY!r} was damaged: it was attached to {only!r} only")
    return Saved(None if only is None else tuple(only), tuple(parts))


def adopted(model: PreTrainedModel, stack: Stack, only: tuple[str, ...] | None) -> int:
    """How many of a stack's parts, its first ones, the model was saved with; a stack without them is refused."""
    saved = saved_with(model.config)
    if saved is None:
        return 0
    count = len(saved.parts)
    same = len(stack) >= count and all(map(_is, stack, saved.parts))
    if not same or only != saved.only:
        rule = (
            f"{type(model).__name__} was saved with {saved} attached and is another model without it; heedful.load("
            "folder) gives both, and more can join after it. To take the weights alone: del model.config.heedful"
        )
        raise FieldError("attach()", "what", stack if not same else f"{stack!r} with only={only}", rule, str(saved))
    return count


def _is(part: Part, spelling: dict[str, Any]) -> bool:
    try:
        return spelled(part) == spelling
    except FieldError:  # what cannot be written down is none that was
        return False


@dataclass(eq=False)
class _Takes(Standing):
    """Stands for a module's `save_pretrained` as long as a run is attached; copies of the module have their own."""

    NAME = SAVE

    run: Run


@dataclass(eq=False)
class SavesStack(_Takes):
    """A model's `save_pretrained`, which writes the stack too."""

    only: tuple[str, ...] | None = None

    def __call__(
        self, save_directory: Any, is_main_process: bool = True, state_dict: dict[str, Any] | None = None, **more: Any
    ) -> Any:
        stack, model = self.run.stack, self.module
        if not self.run.installed():
            rule = f"leaves what {stack!r} learned in the weights without it; resume first, or close to save neither"
            raise FieldError("save_pretrained()", "run", "paused", rule, "run.resume()")
        told = {"format": FORMAT, "only": self.only and list(self.only), "parts": [spelled(part) for part in stack]}
        tensors = [x for part in stack for x in fitted_in(part)]
        if tensors and more.get("push_to_hub"):
            rule = f"would leave {TENSORS} behind; save to a folder, and then model.push_to_hub(...)"
            raise FieldError("save_pretrained()", "push_to_hub", True, rule, False)
        if not any(self.run.state.params.values()):
            weights = model.state_dict() if state_dict is None else state_dict
            state_dict = {**weights, MARK: torch.zeros(0, dtype=torch.uint8)}
        if is_main_process:
            _keep(Path(save_directory), tensors)
        config: Any = model.config
        before = getattr(config, KEY, None)
        setattr(config, KEY, told)
        try:
            return self.own(save_directory, is_main_process=is_main_process, state_dict=state_dict, **more)
        finally:
            self.run.state.saves += 1
            if before is None:
                delattr(config, KEY)
            else:
                setattr(config, KEY, before)


@dataclass(eq=False)
class SavesItself(_Takes):
    """The `save_pretrained` of what stands around a model, which may leave the model out, as PEFT does."""

    def __call__(self, *args: Any, **more: Any) -> Any:
        before = self.run.state.saves
        out = self.own(*args, **more)
        if self.run.state.saves == before:
            warnings.warn(
                f"{type(self.module).__name__} saved what is its own, without {self.run.stack!r} and what that "
                "learned; save the transformers model in it as well, with its own save_pretrained",
                stacklevel=2,
            )
        return out


@dataclass(eq=False)
class Saving:
    """Stands for whatever `save_pretrained` there is around a model of transformers while a run is attached to it."""

    model: nn.Module
    only: tuple[str, ...] | None
    _all: list[_Takes] = field(default_factory=list, init=False)

    def begin(self, run: Run) -> None:
        if self._all or not run.stack or not isinstance(self.model, PreTrainedModel):
            return
        around = run.model is not self.model and hasattr(type(run.model), SAVE)
        self._all = [SavesStack(self.model, run, only=self.only)]
        self._all += [SavesItself(run.model, run)] if around else []
        for takes in self._all:
            takes.begin()

    def pause(self) -> None:
        """Let models be saved as they are, unless what a stack learned would be saved without it."""
        if not any(any(takes.run.state.params.values()) for takes in self._all):
            self.end()

    def end(self) -> None:
        for takes in self._all:
            takes.end()
        self._all = []


def _keep(folder: Path, tensors: list[Fitted]) -> None:
    """Write fitted tensors beside the weights, before anything there names them; take away those of another stack."""
    from safetensors.torch import save_file

    path = folder / TENSORS
    with writing(folder):
        if not tensors:
            path.unlink(missing_ok=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        flat = {f"{one.digest}/{name}": x.cpu() for one in tensors for name, x in one.items()}
        with placed(path) as beside:
            save_file(flat, str(beside), metadata={"heedful": "fitted"})


def kept(path: Path) -> dict[str, Fitted]:
    """Fitted tensors by digest, each as it was; a file that holds anything else is refused."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, dict[str, Any]] = {}
    try:
        for key, x in load_file(str(path)).items():
            digest, _, name = key.partition("/")
            found.setdefault(digest, {})[name] = x
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise ModelError(f"cannot read {path}: {error}; save the model again, with its stack attached") from error
    out = {digest: Fitted(tensors) for digest, tensors in found.items()}
    for digest, one in out.items():
        if one.digest != digest:
            raise ModelError(f"{path} was damaged or changed after it was saved: its checksum is another")
    return out
