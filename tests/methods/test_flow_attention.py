"""FlowAttention against the paper's flows, pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Shape
from heedful.methods import FlowAttention
from tests.methods.linear import Text, agrees, drawn, refuses_a_cache_that_was_cut_back


def _capacity(text: Text) -> Tensor:
    """What may flow between each sink and source, `[n m]`."""
    return (1 / (1 + (-text.q).exp())) @ (1 / (1 + (-text.k).exp())).T


def _of_all(text: Text) -> Tensor:
    """Equations 4 to 8, of a text that is seen as a whole."""
    s = _capacity(text)
    n, m = s.shape
    let_in, let_out = s.sum(1), s.sum(0)
    kept_in, kept_out = (s / let_out).sum(1), (s / let_in[:, None]).sum(0)
    won = kept_out.clamp(max=1).softmax(0) * m
    got = (s / let_in[:, None]) @ (won[:, None] * text.v)
    return got / (1 + (-kept_in * n / m).exp())[:, None]


def _so_far(text: Text) -> Tensor:
    """The authors' causal form: every sum over tokens so far, and of flows the mean over these."""
    s = _capacity(text)
    rows: list[Tensor] = []
    let_in, let_out, kept_out, won = (torch.zeros(0, dtype=torch.float64) for _ in range(4))
    for i in range(len(s)):
        let_in = torch.cat([let_in, (i + 1) / s[i, : i + 1].sum()[None]])
        let_out = torch.cat([let_out, (i + 1) / s[: i + 1, i].sum()[None]])
        kept_in = (s[i, : i + 1] * let_out).mean()
        kept_out = torch.cat([kept_out, (s[: i + 1, i] * let_in).mean()[None].clamp(max=1).exp()])
        won = torch.cat([won, kept_out[-1:] / kept_out.mean()])
        got = (s[i, : i + 1] * let_in[i] / (i + 1) * won) @ text.v[: i + 1]
        rows.append(got / (1 + (-kept_in).exp()))
    return torch.stack(rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_flows_are_those_of_pairs(causal: bool, padded: bool) -> None:
    agrees(FlowAttention(), _so_far if causal else _of_all, causal, padded)


@pytest.mark.parametrize("causal", [False, True])
def test_thin_flows(causal: bool) -> None:
    """Of less than one in all."""
    agrees(FlowAttention(), _so_far if causal else _of_all, causal, padded=True, lower=4.0)


def test_another_number_of_sinks_than_of_sources() -> None:
    agrees(FlowAttention(), _of_all, causal=False, padded=False, shape=Shape(q=5, k=19, dv=6))


def test_a_cache_that_was_cut_back_is_refused() -> None:
    refuses_a_cache_that_was_cut_back(FlowAttention())


def test_a_text_that_was_read_without_it_begins_where_it_goes_on() -> None:
    bare, call = drawn(causal=True, padded=False, shape=Shape(q=4, k=19, dv=6))
    found = FlowAttention().attend((bare.q, bare.k, bare.v), call)
    short, begin = drawn(causal=True, padded=False, shape=Shape(q=4, k=4, dv=6))
    wanted = FlowAttention().attend((bare.q, bare.k[:, :, 15:], bare.v[:, :, 15:]), begin)
    assert short.q.shape == bare.q.shape
    assert torch.equal(found, wanted)
