"""Laws that one attention call must keep, tried without a model."""

from __future__ import annotations

import io
import itertools
import pickle
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Refused, Shape, parameters, poisoned, serving
from heedful.conformance.place import place
from heedful.conformance.subjects import CROSS, tiny_model
from heedful.conformance.tolerances import MERGE, close, close_model, error, within_budget
from heedful.conformance.verdict import Broken, DoesNotApply, law
from heedful.core.errors import HeedfulError
from heedful.core.mask import Causal, Dense
from heedful.core.method import Method
from heedful.core.sites import HEADLESS_SITES, Site
from heedful.core.stats import Cat, Statistic, load, merged, save
from heedful.core.values import replace

TwoLayers = partial(Bare, depth=2)  # what a method does may begin after the first
SHAPES = {
    "MHA": Shape(g=4),
    "GQA": Shape(),
    "MQA": Shape(g=1),
    "a head width unlike e / h, and another for values": Shape(d=10, dv=6),
    "one token": Shape(q=1, k=1),
    "one query after many keys": Shape(q=1),
    "one key": Shape(q=1, k=1, h=1, g=1),
    "one head": Shape(h=1, g=1),
}


def _inside(method: Method) -> None:
    """Some of the method acts between projection and output projection."""
    if all(edit.site in HEADLESS_SITES for edit in method.edits):
        raise DoesNotApply("acts on the residual stream only")


def _may_pass(method: Method, backend: str) -> bool:
    """Whether what the method makes of the mask may be nothing for this kernel."""
    return backend in ("native", "sdpa", "triton") and any(e.site is Site.MASK and not e.reads for e in method.edits)


@law("the tensors handed to a method are as they were afterwards")
def hands_off(method: Method) -> None:
    _inside(method)
    bare = TwoLayers()
    given = {"query": bare.q, "key": bare.k, "value": bare.v, "hidden": bare.hidden}
    before = {name: x.clone() for name, x in given.items()}
    bare.run(method, serving(method)[-1])
    for name, x in given.items():
        if not torch.equal(x, before[name]):
            raise Broken(f"{name} was changed in place")


@law("grouped, multi- and single-query heads, odd widths, one token and one key all work")
def any_shape(method: Method) -> None:
    _inside(method)
    for name, shape in SHAPES.items():
        if method.above() and shape.q < shape.k:
            continue  # the rows above were read in an earlier call, and here is none
        heads, _ = TwoLayers(shape).run(method, serving(method)[-1])
        if not bool(heads.isfinite().all()):
            raise Broken(f"{name}: the output is not finite")


@law("the answer does not depend on the size of a tile")
def any_tile(method: Method) -> None:
    _inside(method)
    if "tiled" not in serving(method):
        raise DoesNotApply("needs the whole map at once")
    bare = TwoLayers()
    whole, told = bare.run(method, "tiled", tile_rows=64)
    for rows in (1, 5, 19):
        heads, parts = bare.run(method, "tiled", tile_rows=rows)
        if not close(heads, whole):
            raise Broken(f"tiles of {rows} rows change the output by {error(heads, whole):.2g}")
        for name, stat in told.items():
            if name not in parts:
                raise Broken(f"tiles of {rows} rows lose the statistic {name!r}")
            _same(stat, parts[name], f"tiles of {rows} rows change {name!r}", exact=False)


@law("a query that may see nothing gets zeros, never NaN")
def masked_rows(method: Method) -> None:
    _inside(method)
    table = torch.ones(2, 1, 19, 19, dtype=torch.bool, device=place()).tril()
    table[0, :, 3] = False
    table[1, :, :6] = False
    blind = ~table.any(-1)[:, 0]
    text = torch.ones(2, 19, dtype=torch.bool, device=place())
    text[1, :6] = False
    mixes = any(e.site is Site.MIX for e in method.edits)
    bare = TwoLayers(text=text) if mixes else TwoLayers(rules=(Causal(), Dense(table)))
    if mixes:
        blind = ~text
    for backend in serving(method):
        try:
            heads, _ = bare.run(method, backend)
        except Refused:
            if not _may_pass(method, backend):
                raise
            continue
        if not bool(heads.isfinite().all()):
            raise Broken(f"{backend}: the output is not finite")
        untouched = not any(e.site is Site.HEAD_OUTPUT and not e.reads for e in method.edits)
        if untouched and bool(heads.transpose(1, 2)[blind].any()):
            raise Broken(f"{backend}: a query that may see nothing got something")


@law("later tokens never change what earlier ones get")
def causal(method: Method) -> None:
    _inside(method)
    if not method.causal:
        raise DoesNotApply("does not claim to be causal")
    bare = TwoLayers()
    before, _ = bare.run(method, serving(method)[-1])
    cut = 11
    for name in ("q", "k", "v"):
        getattr(bare, name)[:, :, cut:] += 3.0
    bare.hidden[:, cut:] -= 2.0
    after, _ = bare.run(method, serving(method)[-1])
    if not close(after[:, :, :cut], before[:, :, :cut]):
        raise Broken(
            f"changing tokens from {cut} on moves earlier ones by {error(after[:, :, :cut], before[:, :, :cut]):.2g}"
        )
    if torch.equal(after[:, :, cut:], before[:, :, cut:]):
        raise Broken("changing the last tokens changes nothing at all, so this law tested nothing")
    _causal_across(method, cut)


def _causal_across(method: Method, cut: int) -> None:
    """The same in a decoder's cross-attention, if the method does not refuse it."""
    inputs = CROSS.inputs()
    ids = inputs["decoder_input_ids"]
    later = {**inputs, "decoder_input_ids": torch.cat([ids[:, :cut], ids[:, cut:].flip(1)], 1)}
    try:
        before, after = (
            replace(CROSS, inputs=lambda given=given: given).logits(tiny_model(CROSS.kinds[0]), method)
            for given in (inputs, later)
        )
    except HeedfulError:
        return
    if not close_model(after[:, :cut], before[:, :cut]):
        moved = error(after[:, :cut], before[:, :cut])
        raise Broken(f"in cross-attention, changing tokens from {cut} on moves what earlier ones get by {moved:.2g}")


def _gradients(method: Method, bare: Bare, backend: str, wanted: bool = True) -> tuple[Tensor, list[Tensor]]:
    params = parameters(method, bare.shape.layer, bare.dtype)
    leaves = [bare.q, bare.k, bare.v, *params.values()]
    for x in leaves:
        x.requires_grad_(wanted)
    heads, _ = bare.run(method, backend, tile_rows=7 if backend == "tiled" else None, params=params)
    weight = torch.linspace(-1, 1, heads.numel(), dtype=heads.dtype, device=heads.device).view_as(heads)
    if not heads.requires_grad:
        return heads.detach(), []
    grads = torch.autograd.grad((heads * weight).sum(), leaves, allow_unused=True)
    return heads.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


@law("every backend agrees with the reference, values and gradients, within a budget drawn from float64")
def backends_agree(method: Method) -> None:
    _inside(method)
    text = torch.ones(2, 19, dtype=torch.bool, device=place())
    text[0, :4] = False
    with poisoned():
        exact, exact_grads = _gradients(method, TwoLayers(text=text, dtype=torch.float64), "reference")
        eager, eager_grads = _gradients(method, TwoLayers(text=text), "reference")
        is_text = text[:, None, :, None].expand_as(eager)
        if not bool(eager[is_text].isfinite().all()):
            raise Broken("reference: reads memory that nobody wrote, or makes NaN")
        for name in serving(method):
            try:
                found, grads = _served(method, text, name)
            except Refused:
                if not _may_pass(method, name):
                    raise
                continue
            if not within_budget(found[is_text], eager[is_text], exact[is_text]):
                raise Broken(f"{name}: values are off by {error(found[is_text], exact[is_text].float()):.2g}")
            if not grads:
                continue  # asked for gradients, it refused or would have
            for which, g, e, x in zip(_names(len(grads)), grads, eager_grads, exact_grads, strict=True):
                if not within_budget(g, e, x):
                    raise Broken(f"{name}: the gradient of {which} is off by {error(g, x.float()):.2g}")


def _served(method: Method, text: Tensor, backend: str) -> tuple[Tensor, list[Tensor]]:
    """What a backend computes, with gradients where it has them for this method."""
    try:
        return _gradients(method, TwoLayers(text=text), backend)
    except Refused:
        return _gradients(method, TwoLayers(text=text), backend, wanted=False)


def _names(n: int) -> list[str]:
    return ["queries", "keys", "values", *(f"parameter {i}" for i in range(n - 3))][:n]


def _same(a: Statistic, b: Statistic, what: str, exact: bool = True) -> None:
    mine, theirs = a.tensors(), b.tensors()
    if set(mine) != set(theirs) or a.settings() != b.settings():
        raise Broken(f"{what}: other parts or settings")
    for name, x in mine.items():
        y = theirs[name]
        alike = torch.equal(x.nan_to_num(), y.nan_to_num()) if exact else _near(x, y)
        if not alike:
            raise Broken(f"{what}: {name} differs by {error(x, y):.2g}")


def _near(x: Tensor, y: Tensor) -> bool:
    """Statistics gather float32 values in float64: equal but for the order of summation."""
    if not x.is_floating_point():
        return torch.equal(x, y)
    return close(x.float(), y.float())


@law("statistics merge in any order, split as the whole, and survive saving and pickling")
def statistics(method: Method) -> None:
    if not any(edit.reads for edit in method.edits):
        raise DoesNotApply("reads nothing")
    backend = serving(method)[-1]
    found: list[dict[str, Statistic]] = []
    for seed, n in enumerate((19, 7, 12)):
        bare = TwoLayers(Shape(q=n, k=n), seed=seed)
        bare.call = replace(bare.call, forward=seed)
        found.append(bare.run(method, backend)[1])
    for name in found[0]:
        parts = [f[name] for f in found]
        whole = merged(parts)
        for order in itertools.permutations(parts):
            _close_statistics(merged(order), whole, f"{name}: another order of merging")
        _close_statistics(parts[0] + (parts[1] + parts[2]), whole, f"{name}: another grouping")
        with tempfile.TemporaryDirectory() as folder:
            back = load(save(Path(folder) / "s.safetensors", {name: whole}))[name].to(place())
        _same(back, whole, f"{name}: saved and loaded")
        buffer = io.BytesIO()
        pickle.dump(whole, buffer)
        buffer.seek(0)
        _same(pickle.load(buffer), whole, f"{name}: pickled")
    _split_is_whole(method, backend)


@law("every backend tells the same statistics as the reference")
def told_alike(method: Method) -> None:
    if not any(edit.reads for edit in method.edits):
        raise DoesNotApply("reads nothing")
    padded = torch.ones(2, 19, dtype=torch.bool, device=place())
    padded[0, :4] = False
    for text in (None, padded):
        want = TwoLayers(text=text).run(method, "reference")[1]
        for backend in serving(method):
            found = TwoLayers(text=text).run(method, backend, tile_rows=7 if backend == "tiled" else None)[1]
            if set(found) != set(want):
                raise Broken(f"{backend}: other statistics, {sorted(found)} instead of {sorted(want)}")
            for name, stat in want.items():
                _same(stat, found[name], f"{backend}: {name}", exact=False)


def _close_statistics(a: Statistic, b: Statistic, what: str) -> None:
    for name, x in a.tensors().items():
        y = b.tensors()[name]
        if x.shape != y.shape:
            raise Broken(f"{what}: {name} has shape {tuple(x.shape)} instead of {tuple(y.shape)}")
        size = float(y.nan_to_num().abs().max()) if y.numel() else 0.0
        if error(x, y) > MERGE * max(size, 1.0):
            raise Broken(f"{what}: {name} differs by {error(x, y):.2g}")


def _split_is_whole(method: Method, backend: str) -> None:
    """Two texts in one batch tell what they tell one by one."""
    both = TwoLayers()
    together = both.run(method, backend)[1]
    alone = []
    for row in range(2):
        one = TwoLayers(Shape(b=1))
        one.q, one.k, one.v = (x[row : row + 1] for x in (both.q, both.k, both.v))
        one.call = replace(one.call, hidden=both.hidden[row : row + 1], ids=both.ids[row : row + 1])
        alone.append(one.run(method, backend)[1])
    for name, stat in together.items():
        if not isinstance(stat, Cat):
            _same(stat, merged(a[name] for a in alone), f"{name}: a batch is not the sum of its texts", exact=False)
