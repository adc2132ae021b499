"""A run in a model of plain torch, from its first forward to its last, and what it leaves."""

from __future__ import annotations

import copy
import io
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.coverage.probe import DropPattern, Look
from heedful import attach
from heedful.conformance.model_laws import fingerprint
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError, HeedfulError, NotEntered
from heedful.core.method import Method
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Sum

from .interrupting import interrupted
from .samples import PAPER, Gate, Scale, Shares, Sharpness
from .test_torch_modules import Halve, encoder, model_of
from .torch_models import Attention, E, H, Plain, WrittenOut, tokens


def stopped(model: nn.Module) -> Any:
    """A model whose second block ends in an error."""

    def stop(*_: Any) -> None:
        raise ZeroDivisionError

    return model.blocks[1].register_forward_pre_hook(stop)


@pytest.mark.parametrize("known", [True, False])
@torch.no_grad()
def test_a_run_leaves_nothing_behind(known: bool) -> None:
    model, x = Plain(), tokens()
    model.blocks[0].train()
    before, native = fingerprint(model), model(x)
    how = {"inputs": x} if known else {}
    with attach(model, Halve() | Shares(), **how) as run:
        run(x)
        with run.paused():
            assert fingerprint(model) == before
            assert torch.equal(model(x), native)
        run(x)
    assert fingerprint(model) == before
    handle = stopped(model)
    with pytest.raises(ZeroDivisionError), attach(model, Halve(), **how) as run:
        run(x)
    handle.remove()
    assert fingerprint(model) == before
    assert torch.equal(model(x), native)


@torch.no_grad()
def test_an_interrupt_leaves_no_mode_behind() -> None:
    class Interrupted(Attention):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            out = super().forward(x, context)
            if getattr(self, "now", False):
                raise KeyboardInterrupt
            return out

    model, x = nn.Sequential(Interrupted(), Interrupted()), tokens()
    with attach(model, Halve()) as run:
        run(x)
        model[1].now = True
        with pytest.raises(KeyboardInterrupt):
            run(x)
        assert not torch.overrides._get_current_function_mode_stack()
        model[1].now = False
        with WrittenOut(lambda p: p / 2):
            wanted = model_of(run)(x)
        assert close_model(run(x), wanted)


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_a_first_difference_that_is_broken_off_leaves_the_run_in_the_model(compiled: bool) -> None:
    model, x = Plain(), tokens()
    with attach(Plain(), Scale(), inputs=x) as run:
        wanted = run(x)
    for block in model.blocks if compiled else ():
        block.compile(backend="eager")
        block(x)
    with attach(model, Scale()) as run:

        def stop(*_: Any) -> None:
            if run._adapter.ready:  # it was looked at, and this is the forward itself
                raise ZeroDivisionError

        handle = model.blocks[1].register_forward_pre_hook(stop)
        with pytest.raises(ZeroDivisionError):
            run.difference(x)
        handle.remove()
        assert torch.equal(run(x), wanted)


class Louder(Method):
    """Doubles what enters the first layer of a list."""

    paper = PAPER

    @at(Site.EMBEDDING)
    def double(self, stream: Tensor, call: Call) -> Tensor:
        return 2 * stream


@pytest.mark.parametrize(
    ("stack", "model", "why"),
    [
        (Scale().on(layers=[9]), Plain(), "must be below 2"),
        (Scale().on(heads=[9]), Plain(), "must be below 4, the heads of layer 0"),
        (Scale() | Louder(), nn.Sequential(Attention()), "stands in no list"),
    ],
)
@torch.no_grad()
def test_what_the_first_forward_refuses_every_one_refuses(stack: Any, model: nn.Module, why: str) -> None:
    before = fingerprint(model)
    with attach(model, stack) as run:
        for _ in range(3):
            with pytest.raises(HeedfulError, match=why):
                run(tokens())
        assert run.installed()
    assert fingerprint(model) == before


@torch.no_grad()
def test_an_interrupt_in_the_first_forward_leaves_a_run_that_waits_for_it() -> None:
    model, x, at = Plain(), tokens(), 0
    with attach(Plain(), Scale(), inputs=x) as run:
        wanted = run(x)

    def going_in(frame: FrameType) -> bool:
        code = frame.f_code
        return code.co_filename.endswith("adapter.py") and code.co_name in ("look", "_know", "_enter")

    go_on = True
    while go_on:
        with attach(model, Scale()) as run:
            go_on = interrupted(at, partial(run, x), going_in)
            if go_on:
                with pytest.raises(NotEntered, match="called by itself"):
                    model.blocks[0](x)
            assert torch.equal(run(x), wanted), at
        at += 1
    assert at > 20


@torch.no_grad()
def test_looking_at_a_model_changes_nothing_in_it() -> None:
    class Counting(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.norm = nn.BatchNorm1d(10)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            self.count += 1
            return super().forward(self.norm(x) + torch.rand(()))

    model, x = nn.Sequential(Counting(), Counting()).train(), tokens()
    before, state = fingerprint(model), torch.random.get_rng_state()
    run = attach(model, Look(), inputs=x)
    assert torch.equal(torch.random.get_rng_state(), state)
    run.close()
    assert fingerprint(model) == before
    with attach(model, Look()) as run:
        run(x)
    assert [int(m.count) for m in model] == [1, 1]


def test_looking_at_a_model_leaves_graphs_that_hold_its_buffers() -> None:
    model, x = Plain(), tokens()
    model.register_buffer("resting", torch.ones(()))
    loss = (next(model.parameters()) * model.resting).sum()
    attach(model, Look(), inputs=x).close()
    loss.backward()


def test_one_run_at_a_time() -> None:
    model, x = Plain(), tokens()
    with attach(model, Look()) as run:
        for inner in (model, model.blocks[0]):
            with pytest.raises(FieldError, match="attached already"):
                attach(inner, Look())
        run(x)
        with pytest.raises(FieldError, match="attached already"):
            attach(model, Look(), inputs=x)
    attach(model.blocks[0], Look(), inputs=x).close()


@torch.no_grad()
def test_copies_and_files_of_an_attached_model_are_the_plain_model() -> None:
    model, x = encoder(), tokens()
    native = model(x)
    with attach(model, DropPattern()) as run:
        run(x)
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert torch.equal(other(x), native) or close_model(other(x), native)
        with attach(other, DropPattern(), inputs=x) as run:
            assert not close_model(run(x), native)


@torch.no_grad()
def test_whoever_wraps_a_served_module_keeps_a_way_that_does_nothing() -> None:
    """As accelerate does, which puts a function of its own around a module's forward."""
    model, x = Plain(), tokens()
    native, attn = model(x), model.blocks[0].attn
    run = attach(model, Halve(), inputs=x)
    attn.forward = partial(attn.forward)
    assert not torch.equal(run(x), native)
    run.close()
    assert torch.equal(model(x), native)
    del attn.forward
    attn.forward = kept = partial(attn.forward)
    with attach(model, Halve(), inputs=x) as run:
        assert not torch.equal(run(x), native)
    assert attn.forward is kept


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing_are_those_of_the_edited_model(reentrant: bool) -> None:
    x = tokens().requires_grad_()
    wanted = []
    for again in (None, reentrant):
        model = Plain(again=again).train()
        with attach(model, Halve() | Gate(), inputs=x) as run:
            run(x).square().sum().backward()
            found = [p.grad.clone() for p in model.parameters()]
            assert run.state.entered[0] == (1 if again is None else 2)
        wanted = wanted or found
    assert all(close_model(a, b) for a, b in zip(found, wanted, strict=True))
    plain = Plain()
    with WrittenOut(lambda p: p * 0.25):  # the gates halve once more
        plain(x).square().sum().backward()
    own = [p.grad for p in plain.parameters()]
    assert all(close_model(a, b) for a, b in zip((f for f in found if f.shape != (H,)), own, strict=True))


def test_statistics_and_losses_under_checkpointing_count_once() -> None:
    class Counts(Scale):
        @reads(Site.PATTERN)
        def count(self, weights: Tensor, call: Any) -> Sum:
            return Sum.of(torch.ones(1))

    model, x = Plain(again=False).train(), tokens().requires_grad_()
    with attach(model, Counts(), inputs=x) as run:
        (run(x).sum()).backward()
        found = run.answers()
    assert {float(s.value) for s in next(iter(found.values())).values()} == {1.0}
    with attach(model, Sharpness(), inputs=x) as run:
        run(x)
        loss = run.loss()
        with run.paused(), pytest.raises(NotEntered, match="before the run is closed or paused"):
            loss.backward()


@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_a_compiled_model_runs_as_it_is_written(whole: bool) -> None:
    torch.compiler.reset()
    model, x = Plain(), tokens()
    native = model(x)
    if whole:
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        for block in model.blocks:
            block.compile(backend="eager")
    assert close_model(compiled(x), native)
    with attach(compiled, Halve(), inputs=x) as run:
        found = run(x)
        assert run.activity().entered == (0, 1)
    assert close_model(compiled(x), native)
    with attach(model, Halve(), inputs=x) as run:
        assert close_model(run(x), found)
    torch.compiler.reset()
    with WrittenOut(lambda p: p / 2):
        assert close_model(found, Plain()(x))


@torch.no_grad()
def test_a_served_module_inside_another_is_answered_once() -> None:
    class Around(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return super().forward(self.inner(x))

    torch.manual_seed(0)
    model, x = nn.Sequential(Around()), tokens()
    with attach(model, Halve(), inputs=x) as run:
        found = run(x)
        assert len(run.layer_names) == 2
    with WrittenOut(lambda p: p / 2):
        assert close_model(found, model(x))


@torch.no_grad()
def test_what_encodes_is_called_by_itself() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = Plain(), Plain()

        def encode(self, x: Tensor) -> Tensor:
            return self.image(x)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.encode(x) @ self.text(y).mT

    model, x = Two(), tokens()
    with attach(model, Halve(), inputs=lambda: model.encode(x)) as run:
        found = model.encode(x)
        assert run.activity().entered == (0, 1)
        assert run.state.now.number == 0
    with WrittenOut(lambda p: p / 2):
        assert close_model(found, model.encode(x))
    with attach(model, Look()) as run, pytest.raises(NotEntered, match="called by itself"):
        model.encode(x)


@torch.no_grad()
def test_more_axes_than_four() -> None:
    class Windows(nn.Module):
        """Heads stand before windows, and in rows of the batch."""

        num_heads = H

        def __init__(self, rows: bool) -> None:
            super().__init__()
            self.rows = rows

        def forward(self, x: Tensor) -> Tensor:
            if self.rows:
                q = x.view(2, 10, H, 8).transpose(1, 2).flatten(0, 1)
                return F.scaled_dot_product_attention(q, q, q).unflatten(0, (2, H)).transpose(1, 2).flatten(2)
            q = x.view(2, 5, 2, H, 8).permute(0, 3, 1, 2, 4)
            mask = torch.zeros(5, 2, 2)
            return F.scaled_dot_product_attention(q, q, q, mask).permute(0, 2, 3, 1, 4).reshape(2, 10, E)

    for rows in (True, False):
        model, x = nn.Sequential(Windows(rows)), tokens()
        native = model(x)
        with attach(model, Look(), inputs=x, backend="reference") as run:
            assert close_model(run(x), native)
            assert run._adapter.sizes()[0].heads == H
        with attach(model, DropPattern().on(heads=1), inputs=x) as run:
            found = run(x)
        assert not found[..., 8:16].any()
        assert close_model(found[..., 16:], native[..., 16:])


def test_a_block_that_asks_for_queries_and_keys_has_them() -> None:
    """In a model of torch's attention too."""

    class Asks(Method):
        paper = PAPER

        @at(Site.BLOCK, before_rotary=True)
        def attend(self, x: Tensor, call: Call) -> Tensor:
            assert call.query is not None
            assert call.key is not None
            assert call.value is not None
            scores = (call.query @ call.key.mT) * call.scale
            return (scores.softmax(-1) @ call.value).transpose(1, 2).flatten(2)

    model, x = Plain(), tokens()
    with attach(model, Asks(), inputs=x) as run:
        found = run(x)
    for block in model.blocks:
        block.attn.proj = nn.Identity()
    assert close_model(found, model(x))
