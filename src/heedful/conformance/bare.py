"""Attention calls without a model: random queries, keys and values through the engine's own stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from heedful.conformance.place import place, reseeded
from heedful.core.call import Call, Phase
from heedful.core.entry import Layer
from heedful.core.errors import BackendError
from heedful.core.mask import Causal, Mask, Padding, Rule
from heedful.core.method import Method, Stack
from heedful.core.positions import Positions
from heedful.core.regions import Region
from heedful.core.stats import Statistic
from heedful.engine.attend import attend
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends import BACKENDS, Backend
from heedful.engine.backends.tiled import Tiled
from heedful.engine.needs import Needs
from heedful.engine.run_state import RunState

ROLES = dict.fromkeys(("marked", "relevant", "prompt", "image", "context"), ((2, 5),)) | {
    "documents": ((1, 4), (4, 7)),
    "demonstrations": ((1, 4), (4, 7)),
    "bos": ((0, 1),),
    "needle": ((2, 5),),
    "answer": ((8, 11),),
    "patches": Region(((3, 19),), (4, 4)),
}


class Refused(BackendError):
    """A backend that serves the stack passes on this call."""


@dataclass(frozen=True)
class Shape:
    """The size of a bare call."""

    b: int = 2
    h: int = 4
    g: int = 2
    q: int = 19
    k: int = 19
    d: int = 8
    dv: int = 8
    e: int = 24

    @property
    def layer(self) -> Layer:
        return Layer(0, self.h, self.g, self.d, self.dv, self.e)


@dataclass
class Bare:
    """Random tensors of a shape, and the call that goes with them."""

    shape: Shape = field(default_factory=Shape)
    seed: int = 0
    dtype: torch.dtype = torch.float32
    text: Tensor | None = None  # [b, k], False for padding
    rules: tuple[Rule, ...] | None = None
    depth: int = 1  # layers, all of the same tensors

    def __post_init__(self) -> None:
        s = self.shape
        draw = torch.Generator().manual_seed(self.seed)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float64).to(place(), self.dtype)

        self.q, self.hidden = 2 * random(s.b, s.h, s.q, s.d), random(s.b, s.q, s.e)
        self.k, self.v = random(s.b, s.g, s.k, s.d), random(s.b, s.g, s.k, s.dv)
        self.ids = torch.randint(3, 9, (s.b, s.k), generator=draw).to(place())
        rules: tuple[Rule, ...] = (Causal(),)
        pad = None
        if self.text is not None:
            self.text = self.text.to(place())
            rules += (Padding(self.text),)
            pad = self.text.long().cummax(-1).values.logical_not().sum(-1)
        is_text = None if self.text is None else self.text[:, None, s.k - s.q :]
        queries = Positions.row(s.k - s.q, s.q, place(), pad, is_text)
        phase = Phase.DECODE if s.q == 1 and s.k > 1 else Phase.PREFILL
        self.call = Call(
            0, self.depth, "bare", s.h, s.g, queries, Positions.row(0, s.k, place(), pad), s.d**-0.5, phase=phase,
            training=True, ids=self.ids, roles=ROLES, hidden=self.hidden,
            mask=Mask(rules if self.rules is None else self.rules), batch=s.b,
        )  # fmt: skip

    def run(
        self, method: Method, backend: str, tile_rows: int | None = None, params: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Statistic]]:
        """Heads `[b h q d]` of all layers, one after another, and what the method's readers found in each."""
        stack = Stack((method,))
        run_state = RunState(stack)
        run_state.new_forward()
        if params is None:
            params = parameters(method, self.shape.layer, self.dtype)
        chosen = Tiled(tile_rows) if backend == "tiled" else BACKENDS[backend]

        def choose(needs: Needs) -> Backend:
            if reasons := chosen.refuses(needs):
                raise Refused(f"{backend}: " + "; ".join(reasons))
            return chosen

        heads = []
        for layer in range(self.depth):
            run_state.params[0, layer] = params
            call = replace(self.call, layer=layer)
            plan = run_state.plan(call)
            heads.append(attend(AttentionCall(plan, run_state, call), self.q, self.k, self.v, choose)[0])
            run_state.close_call(plan, call)
        return torch.cat(heads, 1), {f"{name}, layer {n}": stat for (_, name, n), stat in run_state.statistics.items()}


def parameters(method: Method, layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    """A method's fresh parameters, drawn the same every time."""
    with torch.random.fork_rng(devices=[]):
        reseeded()
        return {name: x.to(place(), dtype) for name, x in method.parameters(layer).items()}


def serving(method: Method) -> list[str]:
    """The backends that can serve a method, reference last."""
    needs = Needs.of(Stack((method,)).steps(), tensors=(torch.empty(0, device=place()),))
    return [name for name, backend in BACKENDS.items() if not backend.refuses(needs)]


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote holds NaN, so that reading it shows."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
