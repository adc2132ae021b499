"""A look changes a stream to tell where heads are, and what stands behind may then be longer or shorter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import heedful
from heedful.conformance.tolerances import close
from tests.test_written_out import HALVE, Attention, D, H, N
from tests.test_written_out_axes import SECOND, heads_first

pytestmark = pytest.mark.filterwarnings("ignore::heedful.core.errors.InactiveWarning")


class Placed(Attention):
    """Is handed a place for each token."""

    def forward(self, x: Tensor, places: Tensor | None = None) -> Any:
        return super().forward(x + places)


class Lasting(nn.Module):
    """Whose second layer reads fewer tokens, but where the first gives what it gave first; so words have lengths."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(heads_first), Placed(heads_first)])
        self.places = nn.Parameter(torch.randn(N, H * D))
        self.usual = self.layers[0](x).detach()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        tokens = N if torch.equal(x, self.usual) else N - 2
        return self.layers[1](x[:, :tokens], self.places[:tokens])


def test_a_stream_that_a_look_changes_may_be_of_another_length_further_on() -> None:
    torch.manual_seed(0)
    x = torch.randn(H, N, H * D)
    net, second = Lasting(x).eval(), HALVE.on(layers=[1], heads=[1])
    seen: list[Tensor] = []
    taken = net.layers[1].out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    plain = net(x)
    taken.remove()
    heads = seen[0].unflatten(-1, (H, D)) * SECOND.view(H, 1)
    with heedful.attach(net, second, inputs=x) as run:
        assert close(run(x), net.layers[1].out(heads.flatten(2)))
    assert not close(net.layers[1].out(heads.flatten(2)), plain)
