"""Several texts in one row, told apart by a table alone: none of them is padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.coverage.probe import Through
from heedful import attach
from heedful.conformance.tolerances import close
from heedful.core.mask import Causal, Padding

from .samples import Narrow


class Kernel(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Kernel()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x, mask)


X = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
SEES = torch.ones(10, 10, dtype=torch.bool).tril()


@pytest.mark.parametrize("lengths", [(6, 4), (6, 3, 1), (9, 1), (1,) * 10])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.filterwarnings("ignore:this run changed nothing")
@torch.no_grad()
def test_each_text_sees_itself(lengths: tuple[int, ...], causal: bool) -> None:
    table = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool() & (SEES if causal else True)
    model, mask = Model(), table.expand(2, 1, 10, 10)
    wanted = model(X, mask)
    with attach(model, Through(), inputs=(X, mask), backend="reference") as run:
        assert close(run(X, mask), wanted)
    narrow = mask & ((torch.arange(10)[:, None] - torch.arange(10) < 4) | (torch.arange(10) == 0))
    with attach(model, Narrow(), inputs=(X, mask)) as run:
        assert close(run(X, mask), Kernel()(X, narrow))


@pytest.mark.parametrize("unmasked", [True, False])
@torch.no_grad()
def test_padding_that_sees_nothing_or_all_is_padding(unmasked: bool) -> None:
    """transformers lets rows see all that would see nothing."""
    mask = (SEES & (torch.arange(10) >= 3)).expand(2, 1, 10, 10).clone()
    mask[:, :, :3] = unmasked
    model = Model()
    with attach(model, Narrow(), inputs=(X, mask)) as run:
        run(X, mask)
        kinds = {type(rule) for rule in run.state.calls[0].mask.rules}
    assert {Causal, Padding} <= kinds
