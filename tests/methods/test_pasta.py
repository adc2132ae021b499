"""PASTA: in chosen heads the prompt outside a marked span keeps a share alpha, and rows still add up to one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.conformance.tolerances import close
from heedful.core.call import Call, Phase
from heedful.core.errors import FieldError
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.core.summary import Summary
from heedful.methods.intervene.language.pasta import PASTA
from tests.by_hand import padding_counts_for_nothing

N, SPAN = 8, (2, 5)


def _call(state: State, start: int = 0, stop: int = N) -> Call:
    keep = torch.ones(N, N, dtype=torch.bool).tril()[None, None, start:stop, :stop]
    queries, keys = Positions.row(start, stop - start), Positions.row(0, stop)
    phase = Phase.PREFILL if start == 0 else Phase.DECODE
    call = Call(0, 2, "layer", 3, 3, queries, keys, 1.0, phase=phase, roles={"marked": (SPAN,)}, keep=keep)
    return replace(call, state=state, rows=slice(0, stop - start), cols=slice(0, stop))


def _steered(method: PASTA, scores: Tensor, call: Call) -> Tensor:
    method.note_prompt(torch.empty(len(scores), 0), call)
    shift = method.turn_down(Summary(), call)
    pattern = scores.masked_fill(~call.keep, float("-inf")).softmax(-1)
    return pattern if shift is None else shift.of(pattern, slice(None))


def _by_loops(pattern: Tensor, alpha: float, heads: list[int], prompt: int) -> Tensor:
    """The paper's formula, weight by weight."""
    out = pattern.clone()
    for b in range(pattern.shape[0]):
        for h in heads:
            for i in range(pattern.shape[2]):
                factors = [1.0 if SPAN[0] <= j < SPAN[1] or j >= prompt else alpha for j in range(pattern.shape[3])]
                row = torch.stack([f * x for f, x in zip(factors, pattern[b, h, i], strict=True)])
                out[b, h, i] = row / row.sum()
    return out


@pytest.mark.parametrize(("alpha", "heads"), [(0.01, None), (0.3, ((0, 1),)), (2.0, ((0, 0), (0, 2), (1, 1)))])
def test_the_formula(alpha: float, heads: Any) -> None:
    scores = torch.randn(2, 3, N, N, generator=torch.Generator().manual_seed(0))
    call = _call(State())
    plain = scores.masked_fill(~call.keep, float("-inf")).softmax(-1)
    mine = [0, 1, 2] if heads is None else [h for layer, h in heads if layer == 0]
    found = _steered(PASTA(alpha=alpha, heads=heads), scores, call)
    assert close(found, _by_loops(plain, alpha, mine, N))
    assert not close(found, plain)
    assert close(found[..., : SPAN[0], :], plain[..., : SPAN[0], :])  # rows before the span have nothing to turn to


def test_tokens_that_the_model_adds_are_not_turned_down() -> None:
    method, state = PASTA(alpha=0.1), State()
    scores = torch.randn(1, 3, N, N, generator=torch.Generator().manual_seed(0))
    _steered(method, scores[..., :6, :6], _call(state, 0, 6))
    for stop in (7, 8):
        step = _call(state, stop - 1, stop)
        row = scores[..., stop - 1 : stop, :stop]
        assert close(_steered(method, row, step), _by_loops(row.softmax(-1), 0.1, [0, 1, 2], 6))
    _steered(method, scores[..., :7, :7], _call(state, 0, 7))  # another prompt begins
    assert int(state.cache["end"]) == 7


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side: str) -> None:
    padding_counts_for_nothing(PASTA(alpha=0.05), side, roles={"marked": (SPAN,)})


def test_a_fit_takes_the_best_heads_of_every_task() -> None:
    model = models.tiny("llama", num_hidden_layers=2)
    inputs = models.tiny_inputs(model, batch=2, length=16)["input_ids"]
    roles = {"marked": (SPAN,)}

    def gain(place: tuple[int, int], row: int, target: int) -> float:
        ids = inputs[row : row + 1]
        with torch.no_grad():
            plain = model(input_ids=ids).logits[0, -1].log_softmax(-1)
            with attach(model, PASTA().on(*place), roles=roles) as run:
                return float((run(input_ids=ids).logits[0, -1].log_softmax(-1) - plain)[target])

    positions = [(n, h) for n in range(2) for h in range(model.config.num_attention_heads)]
    best = [set(sorted(positions, key=lambda p: -gain(p, row, t))[:4]) for row, t in ((0, 5), (1, 9))]
    batches = [
        {"input_ids": inputs[i : i + 1], "target": torch.tensor([t]), "roles": roles, "task": f"task {i}"}
        for i, t in ((0, 5), (1, 9))
    ]
    assert fit(PASTA(count=4), model, batches[:1]).heads == tuple(sorted(best[0]))
    assert fit(PASTA(count=4), model, batches).heads == tuple(sorted(best[0] & best[1]))
    within = fit(PASTA(count=2, layers=(1,)), model, batches[:1]).heads
    assert {layer for layer, _ in within} == {1}
    with pytest.raises(FieldError, match='roles naming "marked"'):
        fit(PASTA(), model, [{"input_ids": inputs}])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"alpha": 0.0}, r"PASTA\.alpha = 0\.0: must lie from 1e-30"),
        ({"count": 0}, r"PASTA\.count"),
        ({"layers": ()}, r"PASTA\.layers = \(\): must name one or more layers"),
        ({"layers": (-1,)}, r"PASTA\.layers = \(-1,\): must name one or more layers"),
        ({"role": ""}, r"PASTA\.role"),
        ({"heads": ((0, -1),)}, r"PASTA\.heads = .*a pair of layer and head"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        PASTA(**settings)


def test_heads_of_another_model_are_refused() -> None:
    for heads in (((0, 3),), ((2, 0),)):
        with pytest.raises(FieldError, match="fitted to another model"):
            _steered(PASTA(heads=heads), torch.zeros(1, 3, N, N), _call(State()))


def test_a_prompt_ends_where_its_own_text_does() -> None:
    state = State()
    is_filled = torch.ones(3, 1, N, dtype=torch.bool)
    is_filled[1, :, 5:] = is_filled[2] = False
    PASTA().note_prompt(torch.empty(3, 0), replace(_call(state), queries=Positions.row(0, N, is_filled=is_filled)))
    assert state.cache["end"].tolist() == [[[N]], [[5]], [[0]]]
    scores = torch.randn(3, 3, 1, N, generator=torch.Generator().manual_seed(0))
    found = _steered(PASTA(alpha=0.1), scores, _call(state, N - 1, N))
    for b, end in enumerate((N, 5, 0)):
        assert close(found[b : b + 1], _by_loops(scores[b : b + 1].softmax(-1), 0.1, [0, 1, 2], end))


def test_it_is_idle_where_nothing_is_turned_down() -> None:
    call = _call(State())
    for method, idle in ((PASTA(alpha=1.0), True), (PASTA(alpha=2.0), False), (PASTA(heads=((0, 1),)), False),
                         (PASTA(heads=((1, 1),)), True)):  # fmt: skip
        assert method.idle(call) == idle
    assert PASTA().idle(replace(call, cross=True))
