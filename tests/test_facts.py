"""What a result says of its model: weights that differ have another name, wherever they differ."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from heedful.facts import fingerprint
from heedful.tiny import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_number_anywhere_is_seen(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(33, 7), nn.Linear(7, 40, bias=False)).to(dtype)
    before = fingerprint(model)
    assert fingerprint(deepcopy(model)) == before
    for number, p in enumerate(model.parameters()):
        for place in (0, p.numel() // 2, p.numel() - 1):
            other = deepcopy(model)
            changed = list(other.parameters())[number].data.view(-1)
            changed[place] = torch.nextafter(changed[place], changed.new_tensor(torch.inf))
            assert fingerprint(other) != before


def test_a_head_taken_out_is_seen() -> None:
    """So that its model is not told what the whole one was."""
    model = tiny("llama", hidden_size=128, head_dim=32)
    without = deepcopy(model)
    without.model.layers[1].self_attn.o_proj.weight.data[:, 64:96] = 0
    assert fingerprint(without) != fingerprint(model)


def test_rows_exchanged_are_seen_and_odd_shapes_taken() -> None:
    model = nn.ParameterList([torch.arange(120.0).view(40, 3), torch.tensor(2.0), torch.empty(0, 4), torch.empty(0)])
    model.append(nn.Parameter(torch.arange(9.0)[1:]))  # its memory begins at an odd place
    other = deepcopy(model)
    other[0].data[[20, 30]] = other[0].data[[30, 20]]
    assert fingerprint(other) != fingerprint(model)
