"""Calls under torch's own transforms: derivatives carried forward, and many inputs at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import grad, jvp, vmap

from heedful import attach
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.errors import BackendError
from heedful.core.method import Method, Stack
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Mean
from heedful.engine.attend import attend
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends import tiled
from heedful.engine.backends.tiled import Tiled
from heedful.engine.run_state import RunState
from heedful.engine.select import select
from heedful.methods import SinkRate
from heedful.nn import Attention
from heedful.tiny import tiny, tiny_inputs

from .samples import PAPER, Keep, Scale

# torch scripts its own rules when a derivative is first carried forward
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


class Scores(Method):
    """Edits scores."""

    paper = PAPER

    @at(Site.SCORES)
    def double(self, scores: Tensor, call: Call) -> Tensor:
        return scores * 2


class Hides(Method):
    """Hides what scores little, in some rows all of it."""

    paper = PAPER

    @at(Site.SCORES)
    def hide(self, scores: Tensor, call: Call) -> Tensor:
        return scores.masked_fill(scores < 0.3, -torch.inf)


WHAT = [Scale(), SinkRate(), Keep(), Scores()]


def heads(what: Method, bare: Bare, q: Tensor, backend: str = "auto") -> Tensor:
    state = RunState(Stack((what,)))
    state.new_forward()
    job = AttentionCall(state.plan(bare.call), state, bare.call)
    return attend(job, q, bare.k, bare.v, lambda needs: select(backend, needs))[0]


def written_out(bare: Bare, q: Tensor, by: float) -> Tensor:
    """Causal attention in float64, made larger."""
    k, v = (x.double().repeat_interleave(bare.shape.h // bare.shape.g, 1) for x in (bare.k, bare.v))
    later = torch.ones(bare.shape.q, bare.shape.k, dtype=torch.bool).triu(1 + bare.shape.k - bare.shape.q)
    scores = (q @ k.mT * bare.call.scale).masked_fill(later, -torch.inf)
    return scores.softmax(-1) @ v * by


@pytest.mark.parametrize("backend", ["auto", "reference", "tiled"])
@pytest.mark.parametrize("what", WHAT, ids=lambda x: type(x).__name__)
def test_derivatives_are_carried_forward(what: Method, backend: str) -> None:
    bare, by, sharp = Bare(), 2.0 if isinstance(what, Scale) else 1.0, 2.0 if isinstance(what, Scores) else 1.0
    way = torch.randn_like(bare.q)
    _, wanted = jvp(lambda q: written_out(bare, sharp * q, by), (bare.q.double(),), (way.double(),))
    _, found = jvp(lambda q: heads(what, bare, q, backend), (bare.q,), (way,))
    assert close(found, wanted.float())
    with torch.no_grad(), dual_level():
        dual = unpack_dual(heads(what, bare, make_dual(bare.q, way), backend))
        assert dual.tangent is not None
        assert close(dual.tangent, wanted.float())


@pytest.mark.parametrize("backend", ["auto", "reference", "tiled"])
@pytest.mark.parametrize("what", WHAT, ids=lambda x: type(x).__name__)
def test_many_inputs_at_once_are_each_alone(what: Method, backend: str) -> None:
    bare = Bare()
    many = torch.stack([bare.q, bare.q.flip(2), -bare.q])
    found = vmap(lambda q: heads(what, bare, q, backend))(many)
    assert close(found, torch.stack([heads(what, bare, q, "reference") for q in many]))


def test_gradients_of_long_calls_are_those_of_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Bare(Shape(q=40, k=40))
    wanted = grad(lambda q: written_out(bare, q, 2.0).sum())(bare.q.double())
    monkeypatch.setattr(tiled, "KEPT_BYTES", 0)
    assert close(grad(lambda q: heads(Scale(), bare, q, "tiled").sum())(bare.q), wanted.float())


def test_a_kernel_without_derivatives_says_so() -> None:
    bare = Bare()
    with pytest.raises(BackendError, match=r"torch\.func or forward derivatives"):
        jvp(lambda q: heads(Scale(), bare, q, "native"), (bare.q,), (bare.q,))


def test_derivatives_of_a_model_are_carried_through_a_run() -> None:
    model = tiny()
    tokens = tiny_inputs(model)["input_ids"]
    embedded = model.get_input_embeddings()(tokens).detach()
    way = torch.randn_like(embedded)

    def carried() -> Tensor:
        with torch.no_grad(), dual_level():
            tangent: Tensor = unpack_dual(model(inputs_embeds=make_dual(embedded, way)).logits).tangent
            return tangent

    model.set_attn_implementation("eager")
    wanted = carried()
    model.set_attn_implementation("sdpa")
    with attach(model, SinkRate()):
        found = carried()
    assert close_model(found, wanted)


def test_what_tiles_wrote_under_inference_mode_takes_what_comes_later() -> None:
    bare, state = Bare(), RunState(Stack((SinkRate(),)))
    state.new_forward()
    job = AttentionCall(state.plan(bare.call), state, bare.call)
    with torch.inference_mode():
        first = attend(job, bare.q, bare.k, bare.v, lambda needs: Tiled(4))[0]
    with torch.no_grad():
        again = attend(job, bare.q, bare.k, bare.v, lambda needs: Tiled(4))[0]
    assert torch.equal(first, again)


@torch.no_grad()
def test_a_tile_that_a_reader_keeps_is_not_written_over() -> None:
    bare, shown = Bare(), list[Tensor]()

    class Hoards(Method):
        paper = PAPER

        @reads(Site.PATTERN)
        def keep(self, pattern: Tensor, call: Call) -> None:
            shown.append(pattern)

    state = RunState(Stack((Hoards(),)))
    state.new_forward()
    for rows in (bare.shape.q, 4):
        backend = Tiled(rows)
        attend(AttentionCall(state.plan(bare.call), state, bare.call), bare.q, bare.k, bare.v, lambda _, b=backend: b)
    whole, *tiles = shown
    assert len(tiles) == 5
    for number, tile in enumerate(tiles):
        assert close(tile, whole[:, :, 4 * number : 4 * (number + 1), : tile.shape[-1]])


class Total(Method):
    """Adds up what each head gives each key, and counts calls."""

    paper = PAPER

    @reads(Site.PATTERN)
    def add(self, pattern: Tensor, call: Call) -> Mean:
        return Mean.of(pattern.double().sum((0, 2)), 1)


@pytest.mark.parametrize("what", [None, Total(), Scores(), SinkRate()], ids=lambda x: type(x).__name__)
def test_a_module_runs_on_as_before_after_many_inputs_at_once(what: Method | None) -> None:
    """Nothing of a transform is kept, and readers count every input."""
    module, other = (Attention(16, 2, what, causal=True, batch_first=True).eval() for _ in range(2))
    other.load_state_dict(module.state_dict())
    x = torch.randn(3, 2, 5, 16)
    wanted = torch.stack([other(row, row, row)[0] for row in x])
    assert close(vmap(lambda row: module(row, row, row)[0])(x), wanted)
    both = vmap(vmap(lambda row: module(row, row, row)[0]))(x)
    assert close(both, wanted)
    slopes = vmap(grad(lambda row: module(row, row, row)[0].sum()))(x)
    assert close(slopes[1], torch.autograd.grad(other(y := x[1].requires_grad_(), y, y)[0].sum(), y)[0])
    assert close(module(x[0], x[0], x[0])[0], wanted[0])
    assert not module.run.activity().nan
    if isinstance(what, Total):
        vmap(lambda row: module(row, row, row)[0])(x)
        found, stat = module.run[what][0], other.run[what][0]
        assert isinstance(found, Mean)
        assert isinstance(stat, Mean)
        assert int(found.count[0, 0]) == 3 + 6 + 3 + 1 + 3
        assert int(stat.count[0, 0]) == 3 + 1


def test_readers_of_many_inputs_find_what_readers_of_each_find() -> None:
    module, other = (Attention(16, 2, Total(), causal=True, batch_first=True).eval() for _ in range(2))
    other.load_state_dict(module.state_dict())
    x = torch.randn(4, 2, 5, 16)
    vmap(lambda row: module(row, row, row)[0], in_dims=0)(x)
    for row in x:
        other(row, row, row)
    assert close(*(each.run[Total()][0].value.float() for each in (module, other)))


def test_what_nobody_sees_is_zero_in_each_of_many_inputs() -> None:
    """An edit that hides pairs of some inputs hides them there alone."""
    bare = Bare()
    many = torch.stack([bare.q, -bare.q])
    found = vmap(lambda q: heads(Hides(), bare, q, "reference"))(many)
    assert close(found, torch.stack([heads(Hides(), bare, q, "reference") for q in many]))
