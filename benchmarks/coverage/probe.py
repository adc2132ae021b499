"""One class under heedful: passed through, read, edited, and left as it was."""

from __future__ import annotations

import ast
import copy
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

import heedful
import heedful.adapters.adapter  # now, so that a sweep under way does not see later edits of it
from heedful.adapters.layers import interface_layers, leftovers
from heedful.conformance.tolerances import DEPTH, ROUNDINGS, close, error, unit, within_budget
from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.errors import HeedfulError, RefusedModel
from heedful.core.mask import Mask
from heedful.core.method import Method, Part
from heedful.core.paper import Paper
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Statistic, Sum

from . import tiny
from .audit import Witness, attention_kinds
from .generation import generated
from .sweep import sensitivity

PRIVATE = Paper("", "Coverage of the model classes", "heedful", 2026)
MOST_HEADS = 16  # one of so many moves an output by about so small a part of what all of them do
TILE_ROWS = 5  # several tiles even for the short texts of a tiny model


class Through(Method):
    """Changes nothing, and makes the engine compute every layer."""

    paper = PRIVATE

    @at(Site.MASK)
    def keep(self, mask: Mask, call: Call) -> Mask:
        return mask


class Look(Method):
    """Reads the pattern, and changes nothing."""

    paper = PRIVATE

    @reads(Site.PATTERN)
    def weigh(self, pattern: Tensor, call: Call) -> Statistic:
        return Sum.of(pattern.sum())


class DropPattern(Method):
    """No attention at all."""

    paper = PRIVATE

    @at(Site.PATTERN)
    def drop(self, pattern: Tensor, call: Call) -> Tensor:
        return torch.zeros_like(pattern)


class DropHeads(Method):
    """Nothing comes out."""

    paper = PRIVATE

    @at(Site.HEAD_OUTPUT)
    def drop(self, heads: Tensor, call: Call) -> Tensor:
        return torch.zeros_like(heads)


class Gates(Method):
    """Nothing comes out, by what is learned for every head: it is as large as the layer was told to be."""

    paper = PRIVATE

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"gate": torch.zeros(layer.heads, 1, layer.value_dim)}

    @at(Site.HEAD_OUTPUT)
    def close(self, heads: Tensor, call: Call) -> Tensor:
        return heads * call.params["gate"].to(heads)


def examine(name: str) -> dict[str, Any]:
    """Everything that is asked of one class, as one record."""
    start = time.perf_counter()
    try:
        one = tiny.build(name)
    except tiny.CannotBuild as failure:
        return {"status": "cannot build", "reason": str(failure)}
    record = _examine(one)
    record["model_type"] = one.model.config.model_type
    record["seconds"] = round(time.perf_counter() - start, 2)
    return record


def examine_heads(name: str) -> dict[str, Any]:
    """What becomes of a gate that is learned for each head, alone: its word is the status."""
    try:
        one = tiny.build(name)
    except tiny.CannotBuild as failure:
        return {"status": "cannot build", "reason": str(failure)}
    one.model.set_attn_implementation("eager")
    native = tiny.output_tensors(one.forward())

    def ask(only: list[str] | None) -> dict[str, Any]:
        _under(one, only, Through())  # or what it refuses that has nothing to do with heads
        word, reason = _gated(one, only, native)
        return {"status": word} | ({"reason": reason} if reason else {})

    found, _, refusal = _as_served(one, ask)
    return found if refusal is None else {"status": "not served", "reason": refusal}


def _examine(one: tiny.Tiny) -> dict[str, Any]:
    model = one.model
    model.set_attn_implementation("eager")
    with Witness() as witness:
        one.forward()
    through = bool(interface_layers(model))
    own = {type(m).__name__ for m in leftovers(model).values()}
    if not through and not own | attention_kinds(model) | witness.maps:
        return {"status": "no attention"}
    found, only, refusal = _as_served(one, lambda only: _serve(one, only))
    record: dict[str, Any] = {"through": through} | ({} if only is None else {"only": only, "own": sorted(own)})
    if refusal is not None:
        return {"status": "refused", "reason": refusal, **record}
    record |= found
    wrong = [f"{mode}: {what}" for mode in ("eager", "sdpa") for what in record.get(mode, {}).get("wrong", ())]
    if (far := record.get("generate", {}).get("roundings", 0.0)) is None or far > ROUNDINGS * DEPTH:
        wrong.append(f"generate: {far} roundings off")
    status = "wrong" if wrong else "served" if only is None else "served in part"
    return {"status": status, **({"reason": "; ".join(wrong)} if wrong else {}), **record}


def _as_served(
    one: tiny.Tiny, ask: Callable[[list[str] | None], dict[str, Any]]
) -> tuple[dict[str, Any], list[str] | None, str | None]:
    """What the model answers, or the part of it that a refusal names; that part, and the refusal that stands."""
    only: list[str] | None = None
    while True:
        try:
            heedful.attach(one.model, Through(), only=only).close()
            return ask(only), only, None
        except HeedfulError as refusal:
            suggested = _suggestion(str(refusal)) if only is None else None
            if suggested is None:
                text = str(refusal) if isinstance(refusal, RefusedModel) else f"{type(refusal).__name__}: {refusal}"
                return {}, only, text
            only = suggested


def _suggestion(text: str) -> list[str] | None:
    found = re.search(r"only=(\[.*?\])", text)
    return ast.literal_eval(found[1]) if found else None


def _serve(one: tiny.Tiny, only: list[str] | None) -> dict[str, Any]:
    record: dict[str, Any] = {"eager": _mode(one, only, whole=True)}
    if (steps := generated(one, only, Through())) is not None:
        record["generate"] = steps
    if getattr(one.model, "_supports_sdpa", False):
        try:
            one.model.set_attn_implementation("sdpa")
        except ValueError as refusal:  # some part of the model, a convolutional backbone say, cannot be asked for sdpa
            record["no sdpa"] = str(refusal)[:120]
            return record
        if one.model.config._attn_implementation == "sdpa":
            record["sdpa"] = _mode(one, only, whole=False)
    return record


def _configs(model: nn.Module) -> dict[int, str | None]:
    """The implementation that each config in the model names."""
    found: dict[int, str | None] = {}
    queue: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    while queue:
        config = queue.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config._attn_implementation_internal
            queue += [getattr(config, key, None) for key in config.sub_configs]
    return found


def _under(one: tiny.Tiny, only: list[str] | None, what: Part, **how: Any) -> tuple[list[Tensor], heedful.Run]:
    with heedful.attach(one.model, what, only=only, **how) as run:
        out = tiny.output_tensors(one.forward())
    return out, run


def _mode(one: tiny.Tiny, only: list[str] | None, whole: bool) -> dict[str, Any]:
    """All checks under the implementation that the model has now."""
    before, native = _configs(one.model), tiny.output_tensors(one.forward())
    wrong: list[str] = []
    with Witness() as witness:
        through, run = _under(one, only, Through(), backend="reference")
    entered = run.activity().entered
    record: dict[str, Any] = {"layers": len(run.layer_names), "entered": len(entered)}
    if witness.maps:
        record["outside"] = sorted(witness.maps)
    record["through"] = _compare(one, through, native, "passed through", wrong)
    idle, _ = _under(one, only, Look().when("decode"))
    if not _same(idle, native):
        record["idle"] = _compare(one, idle, native, "left alone", wrong)
    if whole:
        seen, _ = _under(one, only, Look(), tile_rows=TILE_ROWS)
        record["look"] = _compare(one, seen, native, "read", wrong)
        for method in (DropPattern(), DropHeads()):
            dropped, _ = _under(one, only, method.on(heads=0))
            if not _moved(one, dropped, native):
                wrong.append(f"{method!r} moved nothing")
        word, why = _gated(one, only, native)
        record["heads"] = {"status": word, "reason": why}
        if word == "wrong":
            wrong.append(why)
    if not _same(tiny.output_tensors(one.forward()), native):
        wrong.append("not as before after close")
    if _configs(one.model) != before:
        wrong.append("a config was not restored")
    if wrong and all("moved nothing" in text for text in wrong) and not _reaches(one, native, run.layer_names):
        record["unseen"], wrong = True, []  # no edit of any kind could be seen in this model's output
    if not entered:
        record["unseen"], wrong = True, []
    return record | ({"wrong": wrong} if wrong else {})


def _gated(one: tiny.Tiny, only: list[str] | None, native: list[Tensor]) -> tuple[str, str]:
    """What becomes of a gate that is learned for each head, and the reason where that is not well."""
    told = interface_layers(one.model) and (only is not None or not leftovers(one.model))
    for how in ({},) if told else ({}, {"inputs": one.forward}):  # which sizes are known without being looked at
        try:
            closed, run = _under(one, only, Gates(), **how)
            break
        except HeedfulError as refusal:
            why = str(refusal)
        except RuntimeError as error:  # a factor of another shape
            return "wrong", f"the sizes of a layer are not those of its calls: {error}"
    else:
        return "refused", why
    if _moved(one, closed, native):
        return "fine", ""
    if not run.activity().entered or not _reaches(one, native, run.layer_names):
        return "not reached", ""
    return "wrong", f"{Gates()!r} moved nothing"


def _reaches(one: tiny.Tiny, native: list[Tensor], layers: Sequence[str]) -> bool:
    """Whether attention has a say in the output at all, told without heedful: by zeros in its place."""
    twin = tiny.Tiny(copy.deepcopy(one.model), one.inputs)
    if (moved := sensitivity(twin, native)) is not None:
        return bool(moved)
    for name in layers:  # outside the interface, what their modules give as a whole
        twin.model.get_submodule(name).register_forward_hook(lambda _, args, out: _zeros(out))
    silent = tiny.output_tensors(twin.forward())
    return _moved(one, [b + (a - b) / MOST_HEADS for a, b in zip(silent, native, strict=True)], native)


def _zeros(out: Any) -> Any:
    """The same with zeros for the first tensor."""
    if isinstance(out, tuple):
        return (_zeros(out[0]), *out[1:])
    return torch.zeros_like(out) if isinstance(out, Tensor) else out


def _same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(error(a, b) == 0 for a, b in zip(found, wanted, strict=True))


def _moved(one: tiny.Tiny, found: list[Tensor], wanted: list[Tensor]) -> bool:
    pairs = zip(_compared(one, found), _compared(one, wanted), strict=False)
    return len(found) != len(wanted) or not all(close(a, b) for a, b in pairs)


def _compared(one: tiny.Tiny, outputs: list[Tensor]) -> list[Tensor]:
    """The outputs without what says nothing: padding positions, and a dtype's lowest number, which stands for 'never'.

    A query that may see nothing gives zeros here and a mean of all values in eager attention.
    """
    text = one.inputs.get("attention_mask")
    padded = isinstance(text, Tensor) and text.ndim == 2 and not bool(text.all())
    out = []
    for x in outputs:
        if padded and x.ndim > 1 and len(x) == len(text) and text.shape[1] % x.shape[1] == 0:
            gone = text[:, :: text.shape[1] // x.shape[1]] == 0  # sound is often thinned out on its way
            x = x.masked_fill(gone.view(*gone.shape, *[1] * (x.ndim - 2)), 0.0)
        out.append(x.masked_fill(x == torch.finfo(x.dtype).min, 0.0))
    return out


def _compare(one: tiny.Tiny, found: list[Tensor], native: list[Tensor], what: str, wrong: list[str]) -> dict[str, Any]:
    """How far two runs are apart in roundings, and whether that is within the budget."""
    if len(found) != len(native):
        wrong.append(f"{what}: {len(found)} outputs instead of {len(native)}")
        return {"roundings": None}
    far = max(error(a, b) / unit(b) for a, b in zip(_compared(one, found), _compared(one, native), strict=True))
    record: dict[str, Any] = {"roundings": round(far, 2) if far != float("inf") else None}
    if far > ROUNDINGS * DEPTH:
        exact = _exact(one)
        record["float64"] = exact is not None and len(exact) == len(found) and all(
            within_budget(a, b, c)
            for a, b, c in zip(_compared(one, found), _compared(one, native), _compared(one, exact), strict=True)
        )  # fmt: skip
        if not record["float64"]:
            wrong.append(f"{what}: {far:.3g} roundings off")
    return record


def _exact(one: tiny.Tiny) -> list[Tensor] | None:
    """The native outputs in float64, where the model can."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in one.inputs.items()}
    try:
        return tiny.output_tensors(tiny.Tiny(copy.deepcopy(one.model).double(), inputs).forward())
    except Exception:  # noqa: BLE001 - many models have float32 written into them
        return None
