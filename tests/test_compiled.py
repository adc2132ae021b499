"""torch.compile beside a run: the answer is the uncompiled one's, in either order, and no trace is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heedful import attach, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import RefusedModel
from heedful.methods import HeadScale, SinkRate, TempScale
from tests.samples import Shares
from tests.test_residual import Push

IDS = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def logits(call: Callable[..., Any]) -> Tensor:
    return call(IDS).logits


def in_place(model: Any, how: Any) -> Any:
    model.compile(**how)
    return model


def its_forward(model: Any, how: Any) -> Any:
    model.forward = torch.compile(model.forward, **how)
    return model


def layer_by_layer(model: Any, how: Any) -> Any:
    layers = model.model.layers
    layers[0].compile(**how)
    layers[1] = torch.compile(layers[1], **how)
    return model


def around(model: Any, how: Any) -> Any:
    def ask(ids: Tensor) -> Any:
        return model(ids)

    return torch.compile(ask, **how)


def whole(model: Any, how: Any) -> Any:
    return torch.compile(model, **how)


FORMS = (whole, in_place, its_forward, layer_by_layer, around)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # of inductor's import
BACKENDS = ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
EDITS = (TempScale(0.3), TempScale(3.0), Push())


def same(found: Tensor, wanted: Tensor, plain: Tensor) -> bool:
    """Equal, where the edit is one that shows."""
    return close_model(found, wanted) and not close_model(wanted, plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_compiled_before_is_edited_by_each_run_and_then_as_it_was(form: Any, backend: str) -> None:
    model = models.tiny("llama")
    plain, wanted = logits(model), []
    for edit in EDITS:
        with attach(model, edit):
            wanted.append(logits(model))
    call = form(model, {"backend": backend})
    assert close_model(logits(call), plain)
    for edit, answer in zip(EDITS, wanted, strict=True):
        with attach(model, edit) as run:
            assert same(logits(call), answer, plain)
            assert run.activity().active
            assert same(logits(run), answer, plain)
        assert close_model(logits(call), plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_compiled_under_a_run_is_edited_and_is_compiled_after_it(form: Any, backend: str) -> None:
    model = models.tiny("llama")
    plain = logits(model)
    with attach(model, TempScale(0.3)):
        wanted = logits(model)
    with attach(model, TempScale(0.3)):
        call = form(model, {"backend": backend})
        assert same(logits(call), wanted, plain)
    assert close_model(logits(call), plain)
    with attach(model, Push()):
        edited = logits(model)
        assert same(logits(call), edited, plain)


def test_readers_count_a_compiled_call_once() -> None:
    model = models.tiny("llama")
    compiled = torch.compile(model, backend="eager")
    logits(compiled)
    with attach(model, Shares()) as run:
        logits(compiled)
        found = run[Shares()]
    with attach(model, Shares()) as run:
        logits(model)
        wanted = run[Shares()]
    assert str(found) == str(wanted)


def test_one_graph_for_everything_is_refused_under_a_run() -> None:
    model = models.tiny("llama")
    call = around(model, {"backend": "eager", "fullgraph": True})
    with attach(model, TempScale(0.3)), pytest.raises(torch._dynamo.exc.Unsupported, match="heedful run is attached"):
        logits(call)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with attach(model, TempScale(0.3)), pytest.raises(RuntimeError, match="no compiled frames"):
        logits(compiled)


def test_nothing_of_it_is_left_in_the_model() -> None:
    model = models.tiny("llama")
    model.model.layers[0].compile(backend="eager")
    before = [dict(vars(m)) for m in model.modules()]
    with attach(model, TempScale(0.3)):
        pass
    assert all(a == vars(m) for a, m in zip(before, model.modules(), strict=True))


class Logits(nn.Module):
    """A model that gives one tensor, as what writes models down wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = models.tiny().requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_trace_is_refused_where_it_would_lack_what_a_run_computes() -> None:
    model = Logits()
    with attach(model.model, SinkRate()):
        model(IDS)
        with pytest.raises(RefusedModel, match=r"torch\.jit\.trace cannot write down model\.layers\.0"):
            torch.jit.trace(model, (IDS,), check_trace=False)


def test_an_export_holds_what_torchs_own_kernel_serves() -> None:
    model = Logits()
    with attach(model.model, HeadScale.example()):
        want = model(IDS)
        made = torch.export.export(model, (IDS,), strict=False)
    assert close_model(made.module()(IDS), want)
    assert not close_model(model(IDS), want)


def test_an_export_of_what_values_decide_is_refused() -> None:
    model = Logits()
    with attach(model.model, TempScale(0.5)):
        model(IDS)
        with pytest.raises(RefusedModel, match=r"torch\.export cannot write down model\.layers\.0"):
            torch.export.export(model, (IDS,), strict=False)


def test_a_compiled_model_is_attached_to_itself() -> None:
    model = models.tiny("llama")
    compiled = torch.compile(model, backend="eager")
    before = logits(compiled)
    with attach(model, TempScale(0.5)) as run:
        expected = logits(run)
    with attach(compiled, TempScale(0.5)) as run:
        assert torch.equal(logits(run), expected)
        assert torch.equal(logits(compiled), expected)
    assert torch.equal(logits(compiled), before)
