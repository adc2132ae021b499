"""LSSAR against a reading of the paper's two stages in loops."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods import SoftplusAttention
from heedful.methods.mechanisms.normalise.softplus_attention import powered
from tests.methods.rows import agrees, agrees_where_all_is_seen, learns


def weights(query: Tensor, keys: Tensor, power: float) -> Tensor:
    """What one query gives the keys that it sees, the sums left as the paper has them."""
    n, d = keys.shape
    cosines = [query @ k / (query.norm() * k.norm()) for k in keys]
    first = torch.stack([torch.log(1 + torch.exp(math.log(d) * math.log(n) * c)) for c in cosines])
    first = first / first.sum()
    second = torch.relu(n * first - (0 if n <= 3 else 1)) ** power
    return second / second.sum()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("power", [1.0, 3.0, 15.0])
def test_the_formula_in_every_backend(backend: str, power: float) -> None:
    agrees(SoftplusAttention(power), partial(weights, power=power), backend, (0, 2, 3, 4, 6, 7, 18))


def test_a_call_that_hides_nothing_counts_all_keys() -> None:
    agrees_where_all_is_seen(SoftplusAttention(), partial(weights, power=15.0))


def test_the_paper_s_power_is_15() -> None:
    assert SoftplusAttention() == SoftplusAttention(15.0)


def test_equal_keys_leave_nothing_after_the_third_row_and_gradients_stay_finite() -> None:
    bare = Bare()
    k = bare.k[:, :, :1].expand_as(bare.k).clone()
    bare.k = k.requires_grad_()
    heads, _ = bare.run(SoftplusAttention(), "reference")
    v = bare.v.repeat_interleave(2, 1)
    assert close(heads[:, :, 2], v[:, :, :3].mean(2))
    assert not bool(heads[:, :, 3].any())
    heads.square().sum().backward()
    assert bare.k.grad is not None
    assert bool(bare.k.grad.isfinite().all())


def test_the_length_of_queries_and_keys_tells_nothing() -> None:
    bare, longer = Bare(), Bare()
    longer.q, longer.k = 7 * longer.q, 0.2 * longer.k
    method = SoftplusAttention()
    assert close(bare.run(method, "reference")[0], longer.run(method, "reference")[0])


@pytest.mark.parametrize("power", [2.0, 3.0, 15.0, 0.5, 1.5, 3.5])
def test_whole_powers_are_products_of_their_own_and_others_are_torch_s(power: float) -> None:
    x = (0.5 + torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    found = powered(x, power)
    assert ("_Powered" in type(found.grad_fn).__name__) == (power == int(power))
    assert found.data_ptr() != x.data_ptr()
    assert close(found, torch.stack([torch.exp(power * one.log()) for one in x]))
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert close(slope, power * torch.exp((power - 1) * x.detach().log()))


def test_the_first_step_s_loss_and_gradient() -> None:
    learns(SoftplusAttention(3.0), partial(weights, power=3.0))


def test_settings_are_checked() -> None:
    with pytest.raises(FieldError, match=r"SoftplusAttention.power = 0.5: must be 1 or more"):
        SoftplusAttention(0.5)
    with pytest.raises(FieldError, match="power = inf"):
        SoftplusAttention(math.inf)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 6.0, 15.0, 2.5])
def test_powers_and_their_ways_back(power: float) -> None:
    x = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, wanted = powered(x, power), x**power
    assert close(found, wanted)
    assert close(torch.autograd.grad(found.sum(), x)[0], torch.autograd.grad(wanted.sum(), x)[0])
    assert torch.autograd.gradgradcheck(lambda y: powered(y * y, power), x)


def test_products_are_taken_of_whole_powers_alone() -> None:
    x = torch.rand(3, 4).requires_grad_()
    assert powered(x, 1.0) is x
    for power, made in ((2.0, "_Powered"), (15.0, "_Powered"), (2.5, "Pow")):
        assert f"{made}Backward" in str(powered(x, power).grad_fn)
    many = vmap(lambda y: powered(y, 3.0))(x)
    assert close(many, x**3)
