"""Heads of unlike length: held flat, seen padded, and padded only when somebody looks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from heedful.core.ragged import Ragged, padded, spread

COUNTS = [1, 3, 0, 2]


def ragged() -> Ragged:
    """`[2 2 3 1]`, of 1, 3, 0 and 2 entries."""
    x = spread(torch.arange(1.0, 7.0)[:, None], (2, 2), COUNTS)
    assert isinstance(x, Ragged)
    return x


WANTED = torch.tensor([[[0.0, 0, 1], [2, 3, 4]], [[0, 0, 0], [0, 5, 6]]])[..., None]


def test_whoever_computes_with_it_gets_the_padded_copy() -> None:
    x, plain = ragged(), torch.ones(2, 2, 3, 1)
    found = {
        "sum": (x + plain, WANTED + 1),
        "product": (plain.mT @ x, WANTED.sum(2, keepdim=True)),
        "part": (x[:, 1:, :, 0], WANTED[:, 1:, :, 0]),
        "joined": (torch.cat([plain, x], 2), torch.cat([plain, WANTED], 2)),
        "softmax": (torch.softmax(x, 2), torch.softmax(WANTED, 2)),
        "other type": (x.double(), WANTED.double()),
        "copy": (x.clone(), WANTED),
        "picked by it": (plain[x > 2], torch.ones(4)),
        "copy with all in it": (copy.deepcopy([x])[0], WANTED),
        "list": (torch.tensor(x.tolist()), WANTED),
        "array": (torch.from_numpy(x.numpy()), WANTED),
        "array of an array": (torch.from_numpy(np.asarray(x)), WANTED),
    }
    for name, (have, want) in found.items():
        assert type(have) is Tensor, name
        assert torch.equal(have, want), name
    assert padded(plain) is plain


def test_it_is_padded_once_and_not_before_somebody_computes() -> None:
    x = ragged()
    assert (x.shape, x.dim(), x.dtype, x.device, x.is_floating_point()) == (
        (2, 2, 3, 1), 4, torch.float32, torch.device("cpu"), True,
    )  # fmt: skip
    assert not x.requires_grad
    assert repr(x) == "Ragged((2, 2, 3, 1))"
    assert x._whole is None
    first = x.view(12)
    assert first.data_ptr() == x.mT.data_ptr() == padded(x).data_ptr()


def test_nothing_changes_it_in_place() -> None:
    x = ragged()
    before = x.whole.clone()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, pytest.raises(TypeError, match="cannot be changed in place"):
            x.mul_(2)
    assert torch.equal(x.whole, before)


def test_where_columns_lie() -> None:
    assert ragged().table.view(4, 2).tolist() == [[-2, 2], [1, 0], [1, 3], [3, 1]]


def test_heads_of_equal_length_are_a_view() -> None:
    flat = torch.arange(12.0)
    assert spread(flat, (2, 2), [3, 3, 3, 3]).data_ptr() == flat.data_ptr()
    assert spread(flat[:0], (2, 2), [0, 0, 0, 0]).shape == (2, 2, 0)


def test_gradients_find_their_way() -> None:
    flat, weight = torch.ones(6, requires_grad=True), torch.arange(12.0).view(2, 2, 3)
    (spread(flat, (2, 2), COUNTS) * weight).sum().backward()
    assert flat.grad is not None
    assert flat.grad.tolist() == [2.0, 3.0, 4.0, 5.0, 10.0, 11.0]
    factor = torch.ones(2, 2, 3, 1, requires_grad=True)
    (ragged() * factor).sum().backward()
    assert factor.grad is not None
    assert torch.equal(factor.grad, WANTED)
    with torch.no_grad():
        assert isinstance(spread(flat, (2, 2), COUNTS), Ragged)


@pytest.mark.parametrize("counts", [[2, 4], [4, 2]])
def test_as_many_entries_as_if_it_were_even_are_not_even(counts: list[int]) -> None:
    assert (
        spread(torch.arange(6), (1, 2), counts).sum(-1).tolist()
        != spread(torch.arange(6), (1, 2), [3, 3]).sum(-1).tolist()
    )
