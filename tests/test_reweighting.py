"""Weight moved between columns: the same from every backend, also where nobody may see the weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close, close_model, within_budget
from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.errors import DefinitionError, SiteError
from heedful.core.mask import Causal, Dense, Mask, Padding, Rule, Window
from heedful.core.method import Method, Part, Stack, as_stack
from heedful.core.positions import Positions
from heedful.core.reweight import Reweight, reweights
from heedful.core.sites import Site, at
from heedful.core.stats import Sum
from heedful.core.summary import Summary, sums
from heedful.engine import reweighting
from heedful.engine.attend import attend
from heedful.engine.attention_call import AttentionCall
from heedful.engine.run_state import RunState
from heedful.engine.select import explain, select
from heedful.methods.sparse.cache.snap_kv import SnapKV
from heedful.native import library

from .samples import PAPER

N = 70


class Columns(Method):
    """Multiplies some columns; they themselves restore nothing, or all do."""

    paper = PAPER
    causal = False
    columns: tuple[int, ...] = (3, 9)
    factor: float = 0.4
    fixed: bool = True

    @reweights("received")
    def move(self, summary: Summary, call: Call) -> Reweight:
        columns = torch.isin(call.pairs.k_index[:, :, 0], torch.tensor(self.columns)).expand(-1, call.heads, -1)
        return Reweight(torch.where(columns, self.factor, 1.0), ~columns if self.fixed else None)


class Loudest(Method):
    """Takes half from the column that received most, by head: what it does shows what it was told."""

    paper = PAPER
    causal = False

    @reweights("received")
    def move(self, summary: Summary, call: Call) -> Reweight:
        top = summary.received == summary.received.amax(-1, keepdim=True)
        return Reweight(torch.where(top, 0.5, 1.0), ~top)


class Sharper(Method):
    paper = PAPER

    @at(Site.SCORES)
    def sharpen(self, scores: Tensor, call: Call) -> Tensor:
        return 1.5 * scores


class Received(Method):
    paper = PAPER

    @sums("received")
    def look(self, summary: Summary, call: Call) -> Sum:
        return Sum.of(summary.received)


def _tensors(dtype: torch.dtype = torch.float32, loud: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, N, 16, generator=draw, dtype=torch.float64) for h in (6, 2, 2))
    if loud:
        k[:, :, 3] = 3 * q[:, ::3].mean(2)  # nearly all of some rows lies on one column
        q = q + 2 * k[:, :, 3:4].repeat_interleave(3, 1)
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def _call(rules: tuple[Rule, ...], pad: int = 0) -> Call:
    text = torch.ones(2, N, dtype=torch.bool)
    text[1, :pad] = False
    pads = torch.tensor([0, pad])
    queries, keys = Positions.row(0, N, pad=pads, is_filled=text[:, None]), Positions.row(0, N, pad=pads)
    return Call(0, 1, "bare", 6, 2, queries, keys, 0.25, mask=Mask((*rules, Padding(text)) if pad else rules))


def _heads(backend: str, what: Part | Stack, tensors: Any, call: Call, sink: Tensor | None = None) -> Tensor:
    run_state = RunState(as_stack(what))
    run_state.new_forward()
    job = AttentionCall(run_state.plan(call), run_state, call, sink=None if sink is None else sink.to(tensors[0].dtype))
    heads, _, _ = attend(job, *tensors, lambda needs: select(backend, needs))
    assert len(run_state.changed) == sum(
        step.method.neutral() is None and not step.edit.reads for step in run_state.stack.steps()
    )
    return heads


SEES = torch.ones(N, 1, dtype=torch.bool).index_fill(0, torch.tensor([0, 7, 40]), 0)
needs_kernel = pytest.mark.skipif(isinstance(library(), str), reason="no kernel was built")
CASES: dict[str, dict[str, Any]] = {
    "some columns": {},
    "all restore": {"what": Columns((3, 9), 30.0, False)},
    "nothing is left of them": {"what": Columns((0, 1, 30, 69), 0.0)},
    "told by the pattern": {"what": Loudest()},
    "a window": {"rules": (Causal(), Window(9))},
    "no causality": {"rules": ()},
    "padding": {"pad": 8},
    "rows that see nothing": {"rules": (Causal(), Dense(SEES.expand(1, 1, N, N)))},
    "a column takes nearly all": {"loud": True},
    "many columns": {"what": Columns(tuple(range(2, 50)))},
    "some heads": {"what": Columns().on(heads=[0, 4])},
    "a learned sink": {"sink": torch.linspace(-1, 3, 6)[None, :, None, None]},
    "a sink that takes nearly all": {"sink": torch.linspace(6, 20, 6)[None, :, None, None]},
    "the same, and some count a hundredfold": {
        "what": Columns((3, 9), 100.0, False),
        "sink": torch.linspace(6, 20, 6)[None, :, None, None],
    },
}


@needs_kernel
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["native", "tiled"])
def test_backends_agree(name: str, backend: str) -> None:
    case = CASES[name]
    what, sink = case.get("what", Columns()), case.get("sink")
    call, loud = _call(case.get("rules", (Causal(),)), case.get("pad", 0)), case.get("loud", False)
    exact = _heads("reference", what, _tensors(torch.float64, loud), call, sink)
    eager = _heads("reference", what, _tensors(loud=loud), call, sink)
    found = _heads(backend, what, _tensors(loud=loud), call, sink)
    is_text = call.is_text.expand(2, 6, N)
    for h in range(6):  # each by its own size: a sink may leave little of one
        one = [x[:, h][is_text[:, h]] for x in (found, eager, exact)]
        assert within_budget(*one)
    untouched = _heads("reference", Stack(), _tensors(loud=loud), call, sink)
    assert not close(found[is_text], untouched[is_text])


@needs_kernel
def test_each_way_of_the_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    moved = reweighting._moved

    def watched(*given: Any) -> Tensor | None:
        heads = moved(*given)
        found.append(heads is not None)
        return heads

    monkeypatch.setattr(reweighting, "_moved", watched)
    _heads("native", Columns((60, 64)), _tensors(), _call((Causal(),)))
    assert set(found) == {True}
    found.clear()
    _heads("native", Columns(), _tensors(loud=True), _call((Causal(),)))
    assert False in found
    found.clear()
    monkeypatch.setattr(reweighting, "MOST", 16)
    _heads("native", CASES["many columns"]["what"], _tensors(), _call((Causal(),)))
    assert not found


@needs_kernel
@pytest.mark.parametrize("what", [Columns(), Columns(fixed=False)], ids=["set right in tiles", "set right by column"])
def test_low_precision(what: Columns) -> None:
    call = _call((Causal(),))
    exact = _heads("reference", what, tuple(x.double() for x in _tensors(torch.bfloat16)), call)
    eager = _heads("reference", what, _tensors(torch.bfloat16), call)
    found = _heads("native", what, _tensors(torch.bfloat16), call)
    assert found.dtype == torch.bfloat16
    assert within_budget(found, eager, exact)
    wide = _heads("native", what, tuple(x.float() for x in _tensors(torch.bfloat16)), call)
    assert torch.equal(found, wide.bfloat16()), "nothing is rounded before weight was moved"


def test_the_formula() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [0.0, 1.0, 0.0]])[None, None]
    factor, first = torch.tensor([1.0, 0.5, 1.0])[None, None], torch.tensor([True, False, True])[None, None]
    restored = Reweight(factor, first).of(weights, slice(None))[0, 0]
    assert close(
        restored, torch.tensor([[0.5 * 0.85 / 0.7, 0.15, 0.2 * 0.85 / 0.7], [0.95, 0.05, 0.0], [0.0, 1.0, 0.0]])
    )
    spread = Reweight(factor).of(weights, slice(None))[0, 0]
    assert close(
        spread,
        torch.tensor([[0.5, 0.15, 0.2], [0.9, 0.05, 0.0], [0.0, 0.5, 0.0]]) / torch.tensor([[0.85], [0.95], [0.5]]),
    )
    some = Reweight(factor, first).of(weights[..., [1, 2]], torch.tensor([1, 2]))[0, 0]
    assert close(some[0], torch.tensor([0.15, 0.35]))
    assert Reweight(factor, first).touched.tolist() == [1]
    assert Reweight(torch.ones(1, 2, 3), torch.zeros(1, 2, 3, dtype=torch.bool)).touched.tolist() == []


@pytest.mark.parametrize("free", [torch.tensor([[[False, True, True]]]), None])
def test_a_row_with_next_to_nothing_where_sums_are_restored_stays(free: Tensor | None) -> None:
    """What is missing, divided by a number too small to divide by, is infinite."""
    weights = torch.tensor([[[[1.0, 1e-40, 0.0]]]], requires_grad=True)
    found = Reweight(torch.tensor([[[0.0 if free is None else 0.4, 1.0, 1.0]]]), free).of(weights, slice(0, 3))
    assert torch.equal(found, weights)
    found[0, 0, 0, 0].backward()
    assert torch.equal(weights.grad, torch.tensor([[[[1.0, 0.0, 0.0]]]]))


def test_in_a_stack_it_is_told_what_stands_before_it() -> None:
    call, tensors = _call((Causal(),)), _tensors()
    for what in (Sharper() | Loudest(), Loudest() | Columns(), Columns() | Loudest(), Loudest() | Loudest()):
        assert close(_heads("tiled", what, tensors, call), _heads("reference", what, tensors, call))
    assert not close(
        _heads("tiled", Loudest() | Columns(), tensors, call), _heads("tiled", Columns() | Loudest(), tensors, call)
    )


def test_readers_are_told_what_it_leaves() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model, length=20)
    told = []
    for backend in ("reference", "tiled"):
        with torch.no_grad(), attach(model, Loudest() | Received(), backend=backend) as run:
            run(**inputs)
            told.append(run[Received()][0].value)
    with torch.no_grad(), attach(model, Received()) as run:
        run(**inputs)
        plain = run[Received()][0].value
    assert close(told[0], told[1])
    assert not close(told[0], plain)


def test_gradients_go_through_tiles() -> None:
    call = _call((Causal(),))
    grads = []
    for backend in ("reference", "tiled"):
        q, k, v = (x.requires_grad_() for x in _tensors())
        heads = _heads(backend, Columns(), (q, k, v), call)
        grads.append(torch.autograd.grad(heads.square().sum(), (q, k, v)))
    assert all(close(a, b) for a, b in zip(*grads, strict=True))


class Learned(Method):
    paper = PAPER
    causal = False

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"factor": torch.ones(layer.heads)}

    @reweights()
    def move(self, summary: Summary, call: Call) -> Reweight:
        columns = call.keys.index < 5
        return Reweight(torch.where(columns, call.params["factor"][:, None], 1.0))


@pytest.mark.filterwarnings("ignore::heedful.core.errors.InactiveWarning")  # what it begins with changes nothing
def test_what_it_learns_gets_a_gradient() -> None:
    model = models.tiny("llama").requires_grad_(False)
    inputs = models.tiny_inputs(model, length=20)
    grads = []
    for backend in ("auto", "reference"):
        with attach(model, Learned(), backend=backend) as run:
            run(**inputs).logits.square().sum().backward()
            grads.append([p.grad for p in run.parameters()])
    assert all(bool(a.any()) and close_model(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_chunks_and_steps(side: str) -> None:
    model = models.tiny("llama")
    ids, mask = torch.arange(1, 49).view(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, slice(0, 4) if side == "left" else slice(12, 16)] = 0
    found = []
    for backend in ("auto", "reference"):
        with torch.no_grad(), attach(model, Columns((3, 9)) | SnapKV(8, window=2), backend=backend) as run:
            past, logits = None, []
            for start, stop in itertools.pairwise((0, 16, 22, 23, 24)):
                out = run(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], **{CACHE: past}, use_cache=True)
                past = out[CACHE]
                logits.append(out.logits)
            found.append(torch.cat(logits, 1)[mask.bool()])
    assert close_model(*found)


@needs_kernel
def test_what_the_kernel_cannot_do() -> None:
    assert "native     chosen" in str(explain(Columns()))
    for what in (Columns() | Loudest(), Columns() | Received()):
        told = str(explain(what))
        assert "tiled      chosen" in told
        assert f"{what.parts[1]!r} at PATTERN needs the weights after {Columns()!r} at PATTERN" in told
    assert "Sharper() at SCORES needs the scores" in str(explain(Sharper() | Columns()))


class Peeks(Method):
    """Looks at a part that it did not ask for."""

    paper = PAPER

    @reweights("received")
    def move(self, summary: Summary, call: Call) -> None:
        assert summary.received is not None
        assert summary.seen is not None
        assert summary.peak is summary.place is summary.entropy is None


@pytest.mark.parametrize("backend", ["native", "tiled", "reference"])
def test_it_is_told_what_it_asked_for(backend: str) -> None:
    if backend == "native" and isinstance(library(), str):
        backend = "tiled"
    run_state = RunState(as_stack(Peeks()))
    run_state.new_forward()
    call = _call((Causal(),))
    attend(AttentionCall(run_state.plan(call), run_state, call), *_tensors(), lambda needs: select(backend, needs))
    assert sum(run_state.offered.values()) > 0
    assert not run_state.changed


def _twin() -> Method:
    class Columns(Method):
        """Prints like the other one, and silences heads in tiles."""

        __qualname__ = "Columns"
        paper = PAPER
        columns: tuple[int, ...] = (3, 9)
        factor: float = 0.4
        fixed: bool = True

        @at(Site.PATTERN)
        def silence(self, pattern: Tensor, call: Call) -> Tensor:
            return pattern * 0

    return Columns()


def test_methods_that_print_alike_are_told_apart() -> None:
    call, what = _call((Causal(),)), Columns() | _twin()
    assert repr(what.parts[0]) == repr(what.parts[1])
    assert not _heads("auto", what, _tensors(), call).any()


class Wrong(Method):
    paper = PAPER
    given: Any = None

    @reweights()
    def move(self, summary: Summary, call: Call) -> Any:
        return self.given


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (torch.ones(1, 1, N), "must return a Reweight or None, got Tensor"),
        (Reweight(torch.ones(1, 6, N - 1)), r"\[b\|1, h\|1, k\] = \(2, 6, 70\), got \(1, 6, 69\)"),
        (Reweight(torch.ones(1, 2, N)), r"got \(1, 2, 70\)"),
        (Reweight(torch.ones(3, 1, N)), r"got \(3, 1, 70\)"),
    ],
)
def test_wrong_answers(given: Any, match: str) -> None:
    with pytest.raises(SiteError, match=match):
        _heads("reference", Wrong(given), _tensors(), _call((Causal(),)))


def test_wrong_definitions() -> None:
    with pytest.raises(DefinitionError, match=r"@reweights\('recieved'\): no such part.*Did you mean received"):
        reweights("recieved")
    for bad in (-1.0, torch.nan, torch.inf):
        with pytest.raises(DefinitionError, match="must be finite, 0 or above, and at most 1 where `free` is False"):
            Reweight(torch.tensor([[[bad]]]))
    with pytest.raises(DefinitionError, match="at most 1 where `free` is False"):
        Reweight(torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[False, True]]]))
    with pytest.raises(DefinitionError, match=r"`free` must be of type bool, not torch\.float32"):
        Reweight(torch.ones(1, 1, 2), torch.ones(1, 1, 2))
