"""Which switch of a config gives a map its bias."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from heedful.adapters.biases import give_bias


class Net(nn.Module):
    """Two switches give its map a bias, and the first of them brings another map along."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.map = nn.Linear(4, 4, bias=config.gate_bias or config.map_bias)
        if config.gate_bias:
            self.gate = nn.Linear(4, 4)


def test_a_switch_that_brings_more_than_biases_is_passed_over() -> None:
    net = Net(SimpleNamespace(gate_bias=False, map_bias=False))
    bias = give_bias(net, net.map)
    assert bias is net.map.bias
    assert not bias.any()
    assert vars(net.config) == {"gate_bias": False, "map_bias": True}
