"""Edits written into weights: what comes out is a plain transformers model, which needs no heedful to run."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from heedful.core.asked import asks
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, FoldError, RefusedModel, SiteError
from heedful.core.kinds.loaded import Loaded, model_of
from heedful.core.kinds.weights import HeadWeights, Surgery
from heedful.core.method import Method, Part, Scoped, Stack, as_stack, method_of
from heedful.core.sites import Site


@torch.no_grad()
@asks
def fold(model: nn.Module | Loaded, *what: Part | Stack | Surgery, only: str | Iterable[str] | None = None) -> Any:
    """A copy of the model with the edits in its weights: equal in logits, and `save_pretrained` keeps it.

    Methods, stacks and surgery go in one after the other. A FoldError names the method, the site and what prevents it.
    """
    model = model_of(model)
    steps: list[Surgery | Part] = []
    for item in what:
        if not isinstance(item, Surgery | Stack | Method | Scoped):
            raise FieldError("fold()", "what", item, "must be methods, stacks or surgery", "TempScale(0.9)")
        steps += [item] if isinstance(item, Surgery) else _in_order(as_stack(item))
    new, unsaved = rewritten(model, steps, only, "fold()")
    if unsaved:
        raise FoldError(
            f"{type(model).__name__} could not be loaded again after {' | '.join(map(repr, steps))}: {unsaved}; have "
            "it drop as many heads in each layer, or silence heads instead; operate() gives the model as it is"
        )
    return new


def rewritten(
    model: nn.Module, steps: Sequence[Surgery | Part], only: str | Iterable[str] | None, verb: str
) -> tuple[Any, str | None]:
    """A copy of the model with other weights, and why it could not be saved and loaded again, if so."""
    from heedful.adapters.biases import shift_stream
    from heedful.adapters.bound import server_of
    from heedful.adapters.choosing import adapter_for
    from heedful.adapters.folding import renew_config
    from heedful.adapters.projections import projections
    from heedful.adapters.saving import saved_with
    from heedful.adapters.weights import read_weights, require_here, write_weights
    from heedful.adapters.wrapped import unwrapped

    model = unwrapped(model)
    if any(server_of(module) is not None for module in model.modules()):
        rule = "a run is attached to it, which a copy cannot take along; close it first"
        raise FieldError(verb, "model", type(model).__name__, rule, "the model after run.close()")
    if saved := saved_with(model.config):
        raise RefusedModel(
            f"{type(model).__name__} was saved with {saved} attached, and {verb} edits the weights alone; where that "
            "is what you want, del model.config.heedful"
        )
    require_here(verb, model)
    new = copy.deepcopy(model)
    names = adapter_for(new, only).layer_names
    sizes: dict[str, tuple[Layer, Layer]] = {}  # of each layer, before and after
    for step in steps:
        if isinstance(step, Scoped) and step.layers and step.layers[-1] >= len(names):
            raise FieldError(f"{step!r}", "layers", step.layers[-1], f"must be below {len(names)}", len(names) - 1)
        if isinstance(step, Surgery):
            step.require_depth(len(names))
        for i, name in enumerate(names):
            if isinstance(step, Scoped) and step.layers is not None and i not in step.layers:
                continue
            try:
                found = projections(new, name, i)
                old = read_weights(found)
                if isinstance(step, Surgery):
                    edited = step.operate(old, found.size)
                else:
                    edited = _folded(step, old, found, new, name)
                if not isinstance(edited, HeadWeights):
                    word = "operate" if isinstance(step, Surgery) else "folds"
                    raise SiteError(f"{step!r}: {word} must return HeadWeights, not {type(edited).__name__}")
                if edited is not old:
                    write_weights(new, new.get_submodule(name), found, edited)
                    if edited.stream is not None:
                        shift_stream(new, name, names, edited.stream)
            except RefusedModel as why:
                if isinstance(step, Surgery):
                    raise
                raise FoldError(f"{step!r} at {_sites(step)} cannot go into the weights of {name}: {why}") from why
            first, _ = sizes.get(name, (found.size, None))
            sizes[name] = (first, projections(new, name, i).size)
    changed = any(first != last for first, last in sizes.values())
    return new, renew_config(new, {name: last for name, (_, last) in sizes.items()}) if changed else None


def _in_order(stack: Stack) -> list[Part]:
    """The parts as their edits go into weights: what stands nearest to a projection first.

    Edits before the projection that takes them in, such as those of HEAD_OUTPUT, go in from the last to the first.
    """
    ahead = [part for part in stack if any(e.site in (Site.HIDDEN, Site.HEAD_OUTPUT) for e in method_of(part).edits)]
    return [part for part in stack if part not in ahead] + ahead[::-1]


def _sites(part: Part) -> str:
    return " and ".join(edit.site.name for edit in method_of(part).edits)


def _folded(part: Part, old: HeadWeights, found: Any, model: nn.Module, name: str) -> HeadWeights:
    """A layer's weights with one part of a stack in them."""
    from heedful.adapters.folding import obstacle

    method, size, sites = method_of(part), found.size, _sites(part)
    if type(method).folds is Method.folds:
        raise FoldError(f"{part!r} acts at {sites} in a way that no weights can do; attach() it instead")
    heads: tuple[int, ...] | None = None
    if isinstance(part, Scoped):
        if part.phase is not None:
            raise FoldError(f"{part!r} at {sites}: weights serve every phase, not {part.phase.value} alone")
        if part.steps is not None:
            raise FoldError(f"{part!r} at {sites}: weights serve every denoising step, not some alone")
        heads = part.heads
        if heads and heads[-1] >= size.heads:
            raise FieldError(f"{part!r}", "heads", heads[-1], f"must be below {size.heads} in {name}", 0)
    for edit in method.edits:
        if why := obstacle(model, name, found, edit.site):
            raise FoldError(f"{part!r} at {edit.site.name} cannot go into the weights of {name}: {why}")
    given = old if heads is None else replace(old, o=_with(torch.zeros_like(old.o), old.o, heads, 1))
    edited = method.folds(given, size)
    if edited is None:
        raise FoldError(f"{part!r} at {sites} cannot go into the weights of {name}; attach() it instead")
    if edited is given:
        return old
    return edited if heads is None else _chosen(part, old, edited, heads)


def _chosen(part: Part, old: HeadWeights, new: HeadWeights, heads: tuple[int, ...]) -> HeadWeights:
    """The old weights with some heads' from the new ones, which were made while the other heads wrote nothing."""
    if any(getattr(new, x) is not getattr(old, x) for x in ("k", "v", "k_bias", "v_bias")):
        raise FoldError(f"{part!r} changes the projections of keys or values, which heads may share; leave heads out")
    bias = old.q_bias if new.q_bias is None or old.q_bias is None else _with(old.q_bias, new.q_bias, heads, 0)
    return replace(new, q=_with(old.q, new.q, heads, 0), q_bias=bias, o=_with(old.o, new.o, heads, 1))


def _with(old: Tensor, new: Tensor, heads: tuple[int, ...], dim: int) -> Tensor:
    index = torch.tensor(heads, device=old.device)
    return old.index_copy(dim, index, new.index_select(dim, index).to(old.dtype))
