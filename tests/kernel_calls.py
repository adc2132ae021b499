"""What a kernel is tried with: calls of any shape and mask, and a method that asks for all that can be summed up."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import gpu
from heedful.conformance.tolerances import within_budget
from heedful.core.call import Call
from heedful.core.mask import Ahead, Causal, First, FirstQueries, Mask, Padding, Rule, Where, Window
from heedful.core.method import Method, Stack, as_stack
from heedful.core.positions import Positions
from heedful.core.ragged import Ragged
from heedful.core.reweight import Reweight, reweights
from heedful.core.sites import Site, at
from heedful.core.stats import Statistic
from heedful.core.summary import PARTS, Summary, sums
from heedful.core.weighing import Weighing, weighs
from heedful.engine.attend import attend
from heedful.engine.attention_call import AttentionCall
from heedful.engine.run_state import RunState
from heedful.engine.select import select
from heedful.kit.chosen import Chosen

from .samples import PAPER

DEVICE = torch.device(os.environ.get("HEEDFUL_DEVICE", "cpu"))  # where kernels for GPUs are tried
CAUSAL: tuple[Rule, ...] = (Causal(),)
RULES: dict[str, tuple[Rule, ...]] = {
    "everything": (),
    "causal": CAUSAL,
    "sliding": (*CAUSAL, Window(5)),
    "sinks and a window": (*CAUSAL, Window(5) | First(2)),
    "a prefix and both sides": ((Window(5) & Ahead(3)) | First(2) | FirstQueries(3),),
    "holes": (*CAUSAL, Where(lambda q, k: (q - k) % 300 < 200)),
    "blind rows": (*CAUSAL, Where(lambda q, k: q % 3 > 0)),
}


def banded(n: int, m: int) -> Rule:
    """Keys one by one, between a row's first and its last; some rows see nothing."""
    row, col = torch.arange(n)[:, None], torch.arange(m)
    table = (col >= 4 * row + 7) & (col < 4 * row + 200) & ((col + row) % 3 > 0) & (row // 10 != 5)
    return Chosen(lambda rows: table[None, None, rows])


class Everything(Method):
    """Asks for all parts of the summary and hands them to whoever made it."""

    paper = PAPER
    seen: list[Summary]

    @sums(*PARTS)
    def look(self, pattern: Summary, call: Call) -> Statistic | None:
        self.seen.append(pattern)
        return None

    def carries(self, call: Call) -> Tensor:
        return torch.cos(call.keys.index[:, 0, :, None] * torch.arange(17, device=call.keys.index.device))


class Court(Method):
    """A penalty on what each key receives, as high as it is far off a wave."""

    paper = PAPER

    @sums("received", penalises=True)
    def spread(self, pattern: Summary, call: Call) -> Tensor:
        assert pattern.received is not None
        waves = torch.arange(pattern.received.numel(), device=pattern.received.device).view_as(pattern.received).cos()
        return (pattern.received - waves).square().sum()


class Weighed(Method):
    """Makes each weight of its score alone."""

    paper = PAPER
    how: Weighing

    @weighs
    def weigh(self, call: Call) -> Weighing:
        return self.how


WEIGHINGS = (
    Weighing("sigmoid", -1.0),
    Weighing("relu"),
    Weighing("relu", 0.5, mean=True),
    Weighing("sigmoid", mean=True),
)


class Same(Method):
    """Touches the queries without changing them, so that a kernel has to run."""

    paper = PAPER

    @at(Site.QUERY)
    def keep(self, q: Tensor, call: Call) -> Tensor:
        return q


def run(
    backend: str,
    method: Method | Stack,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    sink: Tensor | None = None,
    bias: Tensor | None = None,
    losses: list[Tensor] | None = None,
) -> Tensor:
    """A call's heads; what it was penalised by is added to `losses`."""
    if backend == "triton":
        q, k, v, call, sink, bias = on_device((q, k, v, call, sink, bias))
    run_state = RunState(as_stack(method))
    run_state.new_forward()
    job = AttentionCall(run_state.plan(call), run_state, call, bias, sink)
    heads = attend(job, q, k, v, lambda needs: select(backend, needs))[0]
    if losses is not None:
        losses.extend(x.cpu() for x in run_state.losses.values())
    return heads.cpu()


def interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has kernels for GPUs run in triton's interpreter, where no card is named."""
    if gpu.missing():
        pytest.fail(gpu.missing())
    if DEVICE.type == "cpu":
        monkeypatch.setenv(gpu.INTERPRETED, "1")


def on_device(x: Any) -> Any:
    """A value with all its tensors on the device where kernels for GPUs are tried."""
    if DEVICE.type == "cpu":
        return x
    if isinstance(x, Ragged):
        return Ragged(x.flat.to(DEVICE), (x.shape[0], x.shape[1]), x.counts)
    if isinstance(x, Tensor):
        return x.to(DEVICE)
    if isinstance(x, tuple):
        return tuple(map(on_device, x))
    if isinstance(x, Mask):
        return Mask(tuple(map(on_device, x.rules)))
    if isinstance(x, Chosen):
        return Chosen(lambda rows: on_device(x.pick(rows)))
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: on_device(getattr(x, f.name)) for f in fields(x) if f.init})
    return x


def draw(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of (b, h, g, n, k, d, e), laid out as models lay them: tokens before heads."""
    b, h, g, n, m, d, e = shape
    made = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, t, x, w, generator=made) for t, x, w in ((n, h, d), (m, g, d), (m, g, e)))
    return 2 * q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def a_call(shape: tuple[int, ...], rules: tuple[Rule, ...], pad: Tensor | None = None) -> Call:
    _, h, g, n, m, d, _ = shape
    is_text = None
    if pad is not None:
        text = torch.arange(m)[None] >= pad[:, None]
        rules, is_text = (*rules, Padding(text)), text[:, None, m - n :]
    positions = Positions.row(m - n, n, pad=pad, is_filled=is_text), Positions.row(0, m, pad=pad)
    return Call(0, 1, "bare", h, g, *positions, d**-0.5, mask=Mask(rules))


BIASES = (False, True, False), (True, False, True), (True, True, True)  # told apart by text, head, query


def a_bias(shape: tuple[int, ...], apart: tuple[bool, ...]) -> Tensor:
    """What a model adds to its scores: of each key, and of what else is told apart."""
    b, h, _, n, m, *_ = shape
    sizes = [size if one else 1 for size, one in zip((b, h, n), apart, strict=True)]
    return 2 * torch.randn(*sizes, m, generator=torch.Generator().manual_seed(3))


class Halved(Method):
    """Halves a column and lets the others restore what it held."""

    paper = PAPER
    causal = False

    @reweights("received")
    def move(self, summary: Summary, call: Call) -> Reweight:
        columns = (call.pairs.k_index[:, :, 0] == 3).expand(-1, call.heads, -1)
        return Reweight(torch.where(columns, 0.5, 1.0), ~columns)


def compare(
    backend: str,
    shape: tuple[int, ...],
    rules: tuple[Rule, ...],
    pad: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    how: Weighing | None = None,
) -> None:
    """Output and every part of the summary, against the reference in float64."""
    q, k, v = (x.to(dtype) for x in draw(shape))
    call = replace(a_call(shape, rules, pad), softcap=softcap)
    told: dict[str, Summary] = {}
    outs: dict[str, Tensor] = {}
    for name, tensors in (("exact", (q.double(), k.double(), v.double())), ("eager", (q, k, v)), (backend, (q, k, v))):
        heard: list[Summary] = []
        stack = Stack((Everything(heard), *(() if how is None else (Weighed(how),))))
        outs[name] = run(backend if name == backend else "reference", stack, *tensors, call, sink, bias)
        told[name] = heard[0]
    is_text = call.is_text.expand(shape[0], 1, shape[3])
    rows = is_text[..., None].expand(outs[backend].shape)
    assert within_budget(outs[backend][rows], outs["eager"][rows], outs["exact"][rows])
    for part in PARTS:
        found, eager, exact = (getattr(told[x], part).cpu() for x in (backend, "eager", "exact"))
        if part in ("received", "distance"):
            assert within_budget(found, eager, exact), part
            continue
        keep = is_text.mT.expand(found.shape) if part == "carried" else is_text.expand(found.shape)
        if part == "place":
            assert torch.equal(found[keep], exact[keep])
        else:
            assert within_budget(found[keep], eager[keep], exact[keep]), part
    assert torch.equal(told[backend].seen.cpu(), told["eager"].seen)
    assert told[backend].nearest == told["eager"].nearest


def pulled(
    backend: str,
    tensors: tuple[Tensor, ...],
    shape: tuple[int, ...],
    rules: tuple[Rule, ...] = CAUSAL,
    learned: tuple[str, ...] = (),
    **more: object,
) -> tuple[Tensor, ...]:
    """What queries, keys, values and what else is `learned`, bias or sink, are given when the output is given waves."""
    pad, softcap, method = (more.pop(name, None) for name in ("pad", "softcap", "method"))
    losses: list[Tensor] = []
    call = replace(a_call(shape, rules, pad), softcap=softcap)  # type: ignore[arg-type]
    leaves = [x.detach().requires_grad_() for x in tensors]
    beside = {name: more[name].to(tensors[0].dtype).requires_grad_() for name in learned}  # type: ignore[attr-defined]
    heads = run(backend, method or Same(), *leaves, call, losses=losses, **(more | beside))  # type: ignore[arg-type]
    return back(heads, [*leaves, *beside.values()], call, sum(losses, torch.zeros(())))


def back(heads: Tensor, leaves: list[Tensor], call: Call, loss: Tensor | None = None) -> tuple[Tensor, ...]:
    """What leaves are given, when heads are given waves where there is text, and a loss is added."""
    waves = torch.arange(heads.numel(), dtype=torch.float64).view_as(heads).sin() * call.is_text[..., None]
    whole = (heads * waves.to(heads.dtype)).sum()
    return torch.autograd.grad(whole if loss is None else whole + loss.to(whole), leaves)


def compare_pulled(
    backend: str,
    shape: tuple[int, ...],
    rules: tuple[Rule, ...] = CAUSAL,
    learned: tuple[str, ...] = (),
    **more: object,
) -> None:
    """The same against the reference in float64."""
    tensors = draw(shape)
    exact = pulled("reference", tuple(x.double() for x in tensors), shape, rules, learned, **more)
    eager, found = (pulled(name, tensors, shape, rules, learned, **more) for name in ("reference", backend))
    beyond = {"queries": taken(tensors[1], tensors[2]), "keys": taken(tensors[0], tensors[2])}
    for name, a, b, c in zip(("queries", "keys", "values", *learned), found, eager, exact, strict=True):
        assert within_budget(a, b, c, beyond.get(name, 0.0)), name


def taken(factor: Tensor, v: Tensor) -> float:
    """A rounding of what a kernel takes from one another on the way: waves times a value, and times the output."""
    most, value = (float(x.norm(dim=-1).max()) for x in (factor, v))
    return torch.finfo(torch.float32).eps * factor.shape[-1] ** -0.5 * value * v.shape[-1] ** 0.5 * most
