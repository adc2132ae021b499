"""VAR: sinks by massive dimensions lose weight, which goes to a marked span in heads that look at it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods.intervene.vision.var import VAR

N, SPAN = 10, (2, 6)
SINKS = ({0, 3}, {0})


def _stream(sinks: tuple[set[int], ...] = SINKS) -> Tensor:
    """Tokens of width 64, where sinks have one dimension of 50 times the rest: about 7.9 over the mean square."""
    x = torch.ones(len(sinks), N, 64)
    for b, row in enumerate(sinks):
        for i in row:
            x[b, i, 7] = 50.0
    return x


def _call(layer: int, **settings: Any) -> Call:
    keep = torch.ones(N, N, dtype=torch.bool).tril()[None, None]
    positions = Positions.row(0, N)
    call = Call(layer, 4, "layer", 4, 2, positions, positions, 1.0, roles={"marked": (SPAN,)}, keep=keep)
    return replace(call, rows=slice(0, N), cols=slice(0, N), **settings)


def _pattern() -> Tensor:
    scores = torch.randn(2, 4, N, N, generator=torch.Generator().manual_seed(0))
    scores[:, 1:, :, 3] += 3
    scores[:, 2, :, 2:6] += 2
    return scores.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


def _by_loops(pattern: Tensor, m: VAR) -> Tensor:
    """As the authors' code reads, and with a sink share of 0 where the span has no sink."""
    out = pattern.clone()
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(SPAN[1], N)).tolist():
        a = pattern[b, h, i]
        span = sum(float(a[j]) for j in range(*SPAN))
        portion = sum(float(a[j]) for j in range(*SPAN) if j in SINKS[b]) / span
        if portion > m.rho or span < m.least:
            continue
        budget = sum(float(a[j]) * (1 - m.beta) for j in SINKS[b])
        free = [j for j in range(*SPAN) if j not in SINKS[b]]
        for j in SINKS[b]:
            out[b, h, i, j] = m.beta * a[j]
        for j in free:
            out[b, h, i, j] = a[j] + budget * a[j] / a[free].sum()
    return out


@pytest.mark.parametrize("method", [VAR(tau=5.0), VAR(tau=5.0, rho=0.9, least=0.4, beta=0.1), VAR(tau=5.0, dims=(7,))])
def test_the_formula(method: VAR) -> None:
    state = State()
    method.find_sinks(_stream(), _call(1, state=state))
    pattern = _pattern()
    found = method.redistribute(pattern, _call(2, state=state))
    wanted = _by_loops(pattern, method)
    assert close(found, wanted)
    assert close(found.sum(-1), torch.ones(2, 4, N))
    changed = (wanted != pattern).any(-1)
    assert changed.any()
    assert not changed[..., SPAN[1] :].all()  # some heads are left alone


def test_only_the_layer_before_counts() -> None:
    state = State()
    pattern = _pattern()
    assert VAR(tau=5.0).redistribute(pattern, _call(2, state=state)) is pattern
    VAR(tau=5.0).find_sinks(_stream(), _call(0, state=state))
    assert VAR(tau=5.0).redistribute(pattern, _call(2, state=state)) is pattern
    VAR(tau=5.0).find_sinks(_stream(), _call(1, state=state))
    assert VAR(tau=5.0).redistribute(pattern, _call(2, state=state, lowest=2)) is pattern  # a decoder's first layer


def test_other_dimensions_do_not_count_where_some_are_named() -> None:
    state = State()
    VAR(tau=5.0, dims=(8, 9)).find_sinks(_stream(), _call(1, state=state))
    assert not state.forward["sinks"][1].any()


def test_a_dimension_far_below_zero_is_massive_too() -> None:
    state = State()
    VAR(tau=5.0).find_sinks(-_stream(), _call(1, state=state))
    assert [set(row.nonzero().flatten().tolist()) for row in state.forward["sinks"][1]] == list(SINKS)


def test_a_stream_of_next_to_nothing_has_no_sinks() -> None:
    state = State()
    VAR(tau=0.75).find_sinks(torch.full((1, N, 64), 1e-3), _call(1, state=state))
    assert not state.forward["sinks"][1].any()  # 1e-3 / sqrt(1e-6 + 1e-6), not over less


@pytest.mark.parametrize(("layers", "found"), [(2, True), (1, False)])
def test_a_dimension_is_massive_where_half_of_the_layers_say_so(layers: int, found: bool) -> None:
    """Of four layers' first tokens two say so of dimension 3, or one."""
    shares = torch.ones(4, 6)
    shares[:layers, 3] = 9.0
    shares[:3, 1] = 9.0
    shares[:, 2] = 8.0  # no more than tau
    context: Any = _FitContext(shares)
    method = VAR(tau=8.0).fit(context, [{"x": 1}])
    assert method.dims == ((1, 3) if found else (1,))
    assert context.ran == [{"x": 1}]


class _FitContext:
    """A bench whose one reader has found what it was told."""

    def __init__(self, found: Tensor) -> None:
        self.found, self.ran = found, []

    def attach(self, reader: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def __call__(self, **batch: Any) -> None:
        self.ran.append(batch)

    def __getitem__(self, reader: Any) -> Tensor:
        return self.found


def test_cached_tokens_stay_sinks() -> None:
    state = State()
    call = _call(1, state=state)
    VAR(tau=5.0).find_sinks(_stream()[:, :4], replace(call, queries=Positions.row(0, 4)))
    VAR(tau=5.0).find_sinks(_stream()[:, 4:], replace(call, queries=Positions.row(4, 6)))
    assert [set(row.nonzero().flatten().tolist()) for row in state.forward["sinks"][1]] == list(SINKS)


def test_massive_dimensions_are_found_in_first_tokens() -> None:
    model = models.tiny("llama", num_hidden_layers=3)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[:, 5] = 0.0
        embedding[11, 5] = 1e4
    batch = {"input_ids": torch.tensor([[11, 20, 21, 22], [11, 30, 31, 32]])}
    high = embedding.shape[1] ** 0.5
    assert fit(VAR(tau=0.9 * high), model, [batch]).dims == (5,)
    with pytest.raises(FieldError, match=r"VAR\.tau"):
        fit(VAR(tau=1.1 * high), model, [batch])
    with pytest.raises(FieldError, match=r"VAR\.batches = 0: must be 1 or more"):
        fit(VAR(), model, [])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side: str) -> None:
    model, method = models.tiny("llama", num_hidden_layers=3), VAR.example()
    ids = models.tiny_inputs(model, batch=1, length=14)["input_ids"]
    pad = torch.zeros(1, 6, dtype=torch.long)
    parts, marks = [ids, pad], [torch.ones_like(ids), pad]
    if side == "left":
        parts, marks = parts[::-1], marks[::-1]
    padded, mask = torch.cat(parts, 1), torch.cat(marks, 1)
    with torch.no_grad(), attach(model, method, roles={"marked": (SPAN,)}) as run:
        alone = run(input_ids=ids).logits
        found = run(input_ids=padded, attention_mask=mask).logits[mask.bool()][None]
        assert run.activity().active
    assert close_model(found, alone)
    with torch.no_grad():
        assert not close_model(alone, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tau": 0.0}, r"VAR\.tau"),
        ({"beta": 1.5}, r"VAR\.beta = 1\.5: must lie from 0 to 1"),
        ({"least": -1.0}, r"VAR\.least"),
        ({"dims": ()}, r"VAR\.dims"),
        ({"role": ""}, r"VAR\.role"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        VAR(**settings)


def test_it_is_idle_where_sinks_keep_all() -> None:
    assert [VAR(beta=p).idle(_call(1)) for p in (0.0, 0.6, 1.0)] == [False, False, True]


def test_empty_columns_behind_the_text_are_no_sinks() -> None:
    """A cache laid out in advance has more columns than there are tokens."""
    stream, method, state = _stream(), VAR(tau=5.0), State()
    method.find_sinks(stream, _call(1, state=state))
    call = _call(2, state=state)
    wide = torch.ones(N, N + 3, dtype=torch.bool).tril()[None, None]
    longer = replace(call, keys=Positions.row(0, N + 3), keep=wide, cols=slice(0, N + 3))
    pattern = torch.nn.functional.pad(_pattern(), (0, 3))
    found = method.redistribute(pattern, longer)
    assert close(found[..., :N], method.redistribute(_pattern(), call))
    assert not found[..., N:].any()


def test_a_token_at_tau_is_no_sink() -> None:
    stream = torch.full((1, 1, 4), 3.0)
    at = float((stream.abs() * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-6)).amax())
    assert [bool(VAR(tau=tau).massive(stream).any()) for tau in (0.9 * at, at)] == [True, False]
