"""A model that was saved with a stack attached, and its stack, together again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from heedful.adapters.choosing import adapter_for
from heedful.adapters.saving import MARK, TENSORS, Saved, kept, saved_with
from heedful.api import attach
from heedful.catalogue import named
from heedful.core.asked import asks
from heedful.core.errors import HeedfulError, ModelError
from heedful.core.method import Stack
from heedful.core.regions import Roles
from heedful.core.spelling import built
from heedful.engine.learned import PREFIX, fresh, learned
from heedful.engine.run import Run
from heedful.models import require_there
from heedful.models.folders import hub_arguments, reading, require_whole, some

ROOM = "heedful_room"  # what a class with room is told of the stack, beside what the model's own takes


@asks
def load(
    folder: str | Path,
    *,
    kind: type[PreTrainedModel] | None = None,
    backend: str = "auto",
    roles: Roles | Sequence[Roles] | None = None,
    **more: Any,
) -> Run:
    """The run of a model that was saved with a stack attached; `from_pretrained` gets `more`.

    `run.model` is the model with what it learned; saved again, it is saved with its stack again. The folder may be a
    hub id, and `kind` is the model's class where transformers has none of its name.
    """
    hub = hub_arguments(folder, more)
    if not Path(folder).is_dir():
        require_there(str(folder), **more)
    with reading(folder, str(folder)):
        config = AutoConfig.from_pretrained(folder, **hub)
    if (saved := saved_with(config)) is None:
        raise ModelError(
            f"{folder} was saved without a stack; load it with heedful.models.load() or transformers, and attach() one"
        )
    stack = _stack(folder, saved, hub)
    own: Any = kind or _class_of(config)
    with reading(folder, str(folder)):
        how = {**more, **hub, ROOM: (stack, saved), "output_loading_info": True}
        model, found = _with_room(own).from_pretrained(folder, **how)
    model.__class__ = own
    require_whole(str(folder), sorted(name for name in found["missing_keys"] if PREFIX not in name))
    for odd, what in (("missing_keys", "lacks"), ("unexpected_keys", "holds")):
        if names := sorted(name for name in found[odd] if PREFIX in name):
            also = "" if odd == "missing_keys" else "not "
            raise ModelError(f"{folder} {what} {some(names)}, which {stack!r} does {also}learn; save the model again")
    return attach(model, stack, only=saved.only, backend=backend, roles=roles)


def _stack(folder: str | Path, saved: Saved, hub: Mapping[str, Any]) -> Stack:
    path: str | None = str(Path(folder) / TENSORS)
    if not Path(folder).is_dir():
        where = {key: x for key, x in hub.items() if key != "trust_remote_code"}
        with reading(folder, str(folder)):
            path = cached_file(folder, TENSORS, _raise_exceptions_for_missing_entries=False, **where)
    try:
        tensors = kept(Path(path)) if path and Path(path).is_file() else {}
        return Stack(tuple(built(part, named, tensors) for part in saved.parts))  # type: ignore[misc]  # it looks
    except HeedfulError as error:
        raise ModelError(f"{folder}: the stack that it was saved with cannot be built: {error}") from error


def _class_of(config: Any) -> type[PreTrainedModel]:
    """transformers' class of the name that a config gives."""
    for name in config.architectures or ():
        kind = getattr(transformers, str(name), None)
        if (
            isinstance(kind, type)
            and issubclass(kind, PreTrainedModel)
            and getattr(kind, "config_class", None) is type(config)
        ):
            return kind
    raise ModelError(
        f"transformers has no class {', '.join(map(str, config.architectures or ()))!r} for a {type(config).__name__}; "
        "give the model's own: heedful.load(folder, kind=...)"
    )


@cache  # transformers holds on to every class that it has made a model of
def _with_room(kind: Any) -> Any:
    """The class with room for what a stack learned, so that transformers loads it with all other weights."""

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        stack, saved = kwargs.pop(ROOM)
        kind.__init__(self, *args, **kwargs)
        adapter = adapter_for(self, saved.only)
        # transformers makes models without storage, and methods draw on the CPU
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            for x in learned(stack, adapter):
                module = self.get_submodule(adapter.layer_names[x.layer])
                module.register_parameter(x.full, fresh(x.start, self.dtype))

    ignored = [*(kind._keys_to_ignore_on_load_unexpected or ()), re.escape(MARK)]
    body = {"__init__": begin, "__module__": kind.__module__, "_keys_to_ignore_on_load_unexpected": ignored}
    return type(kind.__name__, (kind,), body)
