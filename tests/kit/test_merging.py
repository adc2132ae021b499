"""Numbers of merged tokens, sums and means, against loops."""

from __future__ import annotations

from dataclasses import replace

import torch

from heedful.conformance.bare import Bare
from heedful.core.positions import Positions
from heedful.kit.merging import averaged, is_fixed, kept, numbered, summed

GROUPS = torch.tensor([[3, 1, 1, 3, 4, -1], [0, 1, 2, 3, 4, 5], [-1, 5, 5, -1, 0, 5], [5, 5, 5, 5, 5, 5]])


def test_numbers_go_by_the_first_of_each_group() -> None:
    for row, found in zip(GROUPS.tolist(), numbered(GROUPS).tolist(), strict=True):
        names = list(dict.fromkeys(x for x in row if x >= 0))
        assert found == [names.index(x) if x >= 0 else -1 for x in row]
    assert numbered(torch.tensor([[0]])).tolist() == [[0]]
    assert numbered(torch.tensor([[-1, -1]])).tolist() == [[-1, -1]]


def test_sums_and_means() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 6, 3, generator=draw), 1 + torch.rand(4, 6, generator=draw)
    to = numbered(GROUPS)
    sizes, means = summed(weight, to), averaged(x, to, weight)
    assert sizes.shape == (4, 6)
    assert means.shape == (4, 6, 3)
    for row in range(4):
        for place in range(6):
            mine = [i for i in range(6) if to[row, i] == place]
            total = sum(float(weight[row, i]) for i in mine)
            assert abs(float(sizes[row, place]) - total) < 1e-5
            want = sum((weight[row, i] * x[row, i] for i in mine), torch.zeros(3)) / (total or 1.0)
            assert bool(((means[row, place] - want).abs() < 1e-5).all())
    assert summed(x, to).shape == (4, 6, 3)


def test_what_stands_before_patches_is_fixed_and_so_is_padding() -> None:
    call = replace(Bare().call, roles={"cls": ((0, 1),), "register": ((1, 3),), "patches": ((3, 19),)})
    assert is_fixed(call)[0].tolist() == [True] * 3 + [False] * 16
    assert is_fixed(replace(call, roles={}))[0].tolist() == [True] + [False] * 18
    assert is_fixed(replace(call, roles={"patches": ((1, 19),)}))[0].tolist() == [True] + [False] * 18
    assert not bool(is_fixed(replace(call, roles={"patches": ((0, 19),)})).any())
    text = torch.ones(2, 1, 19, dtype=torch.bool)
    text[1, 0, 17:] = False
    padded = replace(call, queries=Positions.row(0, 19, is_filled=text), roles={"cls": ((0, 1),)})
    assert is_fixed(padded).tolist() == [[True] + [False] * 18, [True] + [False] * 16 + [True] * 2]


def test_those_that_stay_keep_their_order() -> None:
    x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1), requires_grad=True)
    stays = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 1, 1, 0, 0]]).bool()
    found = kept(x, stays)
    assert found.to.tolist() == [[0, -1, 1, 2, -1], [-1, -1, -1, -1, 0], [-1, 0, 1, -1, -1]]
    assert found.stream.shape == (3, 3, 2)
    for row in range(3):
        mine = [i for i in range(5) if stays[row, i]]
        assert torch.equal(found.stream[row, : len(mine)], x[row, mine])
    (grad,) = torch.autograd.grad(found.stream.sum(), x)
    assert torch.equal(grad, stays[..., None].expand_as(x).float())
