"""DynamicConv: kernels that each token predicts, against loops and against the banded matrix of the paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer
from heedful.conformance.tolerances import close
from heedful.methods.mechanisms.local.dynamic_conv import DynamicConv
from tests.methods.conv import block_of, embedded, gated, trained


def _by_loops(x: Tensor, p: dict[str, Tensor], heads: int) -> Tensor:
    """One text `[n e]`: weights of token t from its own gated value, before each channel's mean."""
    z = gated(x, p)
    n, e = z.shape
    kernel = len(p["kernel"]) // heads
    out = torch.zeros_like(z)
    for t in range(n):
        for h in range(heads):
            w = (p["kernel"][h * kernel : (h + 1) * kernel] @ z[t]).exp()
            w = w / w.sum()
            for back in range(min(kernel, t + 1)):
                for c in range(h * e // heads, (h + 1) * e // heads):
                    out[t, c] += w[kernel - 1 - back] * z[t - back, c]
    return out @ p["out"].T + p["out_bias"]


@pytest.mark.parametrize("method", [DynamicConv((3, 5)), DynamicConv((1, 4), heads=2)], ids=repr)
def test_each_token_predicts_its_weights(method: DynamicConv) -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=7)["input_ids"]
    heads = method.heads or 4
    with attach(model, method) as run, torch.no_grad():
        for number in (0, 1):
            p = trained(run, number)
            x, found = block_of(model, run, number, input_ids=ids)
            assert p["kernel"].shape == (heads * method.kernels[number], 32)
            assert close(found, torch.stack([_by_loops(row, p, heads) for row in x]))


def test_the_first_step_of_training() -> None:
    """Loss and every gradient against a banded matrix of weights over the whole text."""
    layer, method = Layer(0, 4, 4, 8, 8, 32), DynamicConv((3,))
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = ({k: v.double().requires_grad_() for k, v in method.parameters(layer).items()} for _ in range(2))
    a, b = (x @ theirs["in"].T + theirs["in_bias"]).chunk(2, -1)
    z = a * b.sigmoid()
    w = (z @ theirs["kernel"].T).view(2, 6, 4, 3).softmax(-1)
    band = sum(torch.diag_embed(w[:, back:, :, 2 - back].mT, -back) for back in range(3))  # [b h n n]
    mixed = (band @ z.view(2, 6, 4, 8).transpose(1, 2)).transpose(1, 2).reshape(2, 6, 32)
    want = (mixed @ theirs["out"].T + theirs["out_bias"]).pow(3).sum()
    found = embedded(method, x, ours).pow(3).sum()
    assert close(found, want)
    grads = [torch.autograd.grad(loss, list(p.values())) for loss, p in ((found, ours), (want, theirs))]
    for mine, other in zip(*grads, strict=True):
        assert bool(other.any())
        assert close(mine, other)


def test_widths_go_by_layer_and_first_weights_have_the_authors_spread() -> None:
    sizes = [DynamicConv().parameters(Layer(n, 4, 4, 8, 8, 32))["kernel"].shape[0] // 4 for n in range(6)]
    assert sizes == [3, 7, 15, 31, 31, 31]
    top = float(DynamicConv((16,)).parameters(Layer(0, 4, 4, 64, 64, 256))["kernel"].abs().max())
    bound = math.sqrt(6 / (4 * 16 + 256))
    assert 0.95 * bound < top <= bound
