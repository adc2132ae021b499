"""LinearSelfAttention against the sum in a loop, and against the gradient step that it can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Shape
from heedful.conformance.tolerances import close
from heedful.methods import LinearSelfAttention
from heedful.nn import Attention
from tests.methods.linear import Text, agrees


def _sums(text: Text) -> Tensor:
    out = []
    for i in range(len(text.q)):
        row = torch.zeros_like(text.v[0])
        for j in range(text.seen(i)):
            row = row + (text.q[i] * text.k[j]).sum() * text.v[j]
        out.append(row)
    return torch.stack(out)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_products(causal: bool, padded: bool) -> None:
    agrees(LinearSelfAttention(), _sums, causal, padded, Shape(dv=6))


@torch.no_grad()
def test_with_the_papers_weights_it_is_one_step_of_gradient_descent() -> None:
    """From w = 0, a step of size eta on half the squared error goes to eta * sum_i y_i x_i."""
    d, n, eta = 4, 11, 0.03
    x, y = torch.randn(1, n, d), torch.randn(1, n)
    asked = torch.randn(1, 1, d)
    layer = Attention(d + 1, 1, LinearSelfAttention(), bias=False, batch_first=True)
    first, last = torch.eye(d + 1), torch.zeros(d + 1, d + 1)
    first[d, d], last[d, d] = 0, 1  # what holds x, and what holds y
    for name, weight in (("q_proj", first), ("k_proj", first), ("v_proj", last), ("out_proj", eta * torch.eye(d + 1))):
        getattr(layer, name).weight.copy_(weight)
    told = torch.cat([x, y[..., None]], -1)
    question = torch.cat([asked, torch.zeros(1, 1, 1)], -1)
    w = torch.zeros(d)
    step = w - eta * sum(((w @ x[0, i] - y[0, i]) * x[0, i] for i in range(n)), torch.zeros(d))
    close(layer(question, told, told)[0][0, 0, d], step @ asked[0, 0])
